"""The product of few rows with a kernel in four bits, as in decoding: the codes are read once, and decoded in place.

Shapes: M rows; `x` is `[M, in]`, `codes` is uint8 `[in / 2, out]` and `scale` is `[in / block, out]`. A byte holds the
codes of two rows of one block: row i of its first half in the low bits, and row i of its second half in the high bits.
The kernel is `levels[code] * scale`, rounded to the dtype of `x`. The plain form is that of the weight in codes.
"""
