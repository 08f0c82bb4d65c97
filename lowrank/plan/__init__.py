"""A config becomes a checked plan; `python -m lowrank.plan` says whether it fits into memory."""

from lowrank.plan.job import CheckpointConfig, ModelConfig, Plan, RunConfig, make

__all__ = ["CheckpointConfig", "ModelConfig", "Plan", "RunConfig", "make"]
