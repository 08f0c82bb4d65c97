"""Post-training quantisation: a model read, quantised, by data where the scheme needs them, and written in codes."""

from lowrank.quantization.write import calibrated, write

__all__ = ["calibrated", "write"]
