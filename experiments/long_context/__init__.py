"""A decoder trained at 512 tokens is taken to 2048: perplexity by position and retrieval, by the way to get there."""
