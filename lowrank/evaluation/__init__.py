"""Scores of a model on held-out data: those of an objective, of gaps filled in, and of texts against references."""

from lowrank.evaluation.evaluate import evaluate
from lowrank.evaluation.evaluator import EvalConfig, Evaluator
from lowrank.evaluation.infilling import document_scores, infill_scores

__all__ = ["EvalConfig", "Evaluator", "document_scores", "evaluate", "infill_scores"]
