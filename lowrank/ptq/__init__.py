"""Post-training quantisation: a model read, quantised and written in codes."""

from lowrank.ptq.write import write

__all__ = ["write"]
