"""The memory that a run takes on each device: by formula, as compiled, and what to change when it does not fit."""
