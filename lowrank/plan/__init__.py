"""A config becomes a checked plan; `python -m lowrank.plan` says whether it fits into memory."""

from lowrank.plan.check import make
from lowrank.plan.config import CheckpointConfig, ModelConfig, RunConfig
from lowrank.plan.job import Plan

__all__ = ["CheckpointConfig", "ModelConfig", "Plan", "RunConfig", "make"]
