"""Products that are written differently for each kind of machine; each has the signature of a plain JAX product."""
