"""Smaller models: pruning and factorisation, of kernels by the statistics of their inputs."""
