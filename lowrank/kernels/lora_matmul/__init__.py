"""The product with a kernel and its low-rank update, `x W + s (x A) B`, without forming `A B`.

Shapes: `x` is `[..., in]`, `w` is `[in, out]`, `a` is `[in, r]`, `b` is `[r, out]` and `scale` is `[]`. The gradient of
`x` is a product of the same kind, `g W^T + s (g B^T) A^T`.
"""
