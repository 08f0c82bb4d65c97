"""Pallas kernels, each beside a plain-JAX reference with the same signature."""
