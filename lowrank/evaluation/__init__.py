"""Scores of a model on held-out data: those of an objective, and generated texts against their references."""

from lowrank.evaluation.evaluate import evaluate
from lowrank.evaluation.evaluator import EvalConfig, Evaluator

__all__ = ["EvalConfig", "Evaluator", "evaluate"]
