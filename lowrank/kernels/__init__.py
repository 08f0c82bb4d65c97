"""What a product costs depends on the machine here: kernels, each with the signature of a plain-JAX reference."""
