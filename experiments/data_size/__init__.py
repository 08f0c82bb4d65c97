"""How many examples each method needs."""
