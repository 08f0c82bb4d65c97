"""Scores of a model on held-out data: perplexity, labels, and generated texts against their references."""
