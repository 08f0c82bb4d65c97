"""Post-training quantization: a model is read, quantized, with calibration data if a scheme needs it, and written."""

from lowrank.quantization.quantized_model import quantize_calibrated, write_quantized

__all__ = ["quantize_calibrated", "write_quantized"]
