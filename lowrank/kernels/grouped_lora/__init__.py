"""The low-rank products of many adapters in one batch, each row with its own adapter.

Shapes: T rows, N adapters, R the largest rank; `x` is `[T, in]`, `a` is `[N, R, in]` and `b` is `[N, R, out]`, both
with zeros beyond an adapter's own rank, `scale` is `[N]` in float32 and `ids` is `[T]`, the adapter of each row. A row
whose id is not one of `0 ... N - 1` has no adapter: its result is zero.
"""
