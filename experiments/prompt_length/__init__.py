"""How long a learned prompt must be, how it should start, and what it says."""
