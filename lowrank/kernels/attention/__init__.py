"""Attention `softmax(scale * q k) v` under a mask that is described, not stored: several forms of one operation.

Shapes: B rows, T queries, S keys, N query heads, K key heads, G = N / K query heads for each key head, H head width;
`q` is `[B, T, N, H]`, `k` and `v` are `[B, S, K, H]`. `mask` describes which keys a query sees, and `dispatch.attend`
chooses among the forms `dense`, `blockwise`, `splash` (TPUs) and `cudnn` (NVIDIA GPUs). `sharded` and `context` divide
the rows, heads and tokens over a mesh.
"""
