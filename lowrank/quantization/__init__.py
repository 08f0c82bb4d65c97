"""Post-training quantization: a model is read, quantized, with calibration data if its scheme needs them, and written."""

from lowrank.quantization.quantized_model import quantize_calibrated, write_quantized

__all__ = ["quantize_calibrated", "write_quantized"]
