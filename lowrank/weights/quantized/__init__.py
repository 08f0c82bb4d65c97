"""Quantized kernels: one storage scheme per file, whose codes are dequantized tile by tile inside the product."""
