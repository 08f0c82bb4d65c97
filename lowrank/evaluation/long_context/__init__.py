"""Scores of long contexts: sliding perplexity, perplexity by position, retrieval, and the price at the old length."""

from lowrank.evaluation.long_context.config import SCORES, LongConfig
from lowrank.evaluation.long_context.reader import Reader
from lowrank.evaluation.long_context.report import grid, heat_map, retrieval_table, write
from lowrank.evaluation.long_context.retrieval import Cell, Prompt, found, prompts, retrieve
from lowrank.evaluation.long_context.score import LongScores, check, score
from lowrank.evaluation.long_context.sliding import TokenScores, by_position, token_scores, windows

__all__ = [
    "SCORES",
    "Cell",
    "LongConfig",
    "LongScores",
    "Prompt",
    "Reader",
    "TokenScores",
    "by_position",
    "check",
    "found",
    "grid",
    "heat_map",
    "prompts",
    "retrieval_table",
    "retrieve",
    "score",
    "token_scores",
    "windows",
    "write",
]
