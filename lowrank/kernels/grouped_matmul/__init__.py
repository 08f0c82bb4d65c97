"""Rows that are sorted by group, each multiplied by the matrix of its group: the product of a layer of experts.

Shapes: R rows and G groups; `x` is `[R, in]`, `w` is `[G, in, out]` and `sizes` is `[G]`, the number of rows of each
group. `dispatch.ragged_dot` chooses among `jax.lax.ragged_dot`, the blocks of `cpu` and the steps of `gpu`.
"""
