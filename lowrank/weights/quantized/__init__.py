"""Kernels kept in codes: one storage scheme per file, decoded tile by tile inside the product."""
