"""How much of what a model knew each method forgets for what it gains."""
