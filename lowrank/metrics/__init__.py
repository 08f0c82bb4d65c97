"""Scores of predictions against references: accuracy, F1, ROUGE, BLEU, exact match and perplexity."""
