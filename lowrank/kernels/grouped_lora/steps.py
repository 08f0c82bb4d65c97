"""The steps of a grouped product in a kernel: one for each adapter and each tile of sorted rows that it has rows in."""

import jax
import jax.numpy as jnp


def plan_steps(keys: jax.Array, adapters: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """`(group, tile)` of each step, for sorted keys `[T]` of which N stands for no adapter, T a multiple of `rows`.

    Steps that are not needed repeat the last tile for no adapter.
    """
    tiles, groups = len(keys) // rows, jnp.arange(adapters + 1)
    first = jnp.searchsorted(keys, groups, side="left")
    end = jnp.searchsorted(keys, groups, side="right")
    counts = jnp.where(end > first, (end - 1) // rows - first // rows + 1, 0)
    after = jnp.cumsum(counts)
    step = jnp.arange(tiles + adapters)
    group = jnp.minimum(jnp.searchsorted(after, step, side="right"), adapters)
    tile = first[group] // rows + step - (after - counts)[group]
    needed = step < after[-1]
    return jnp.where(needed, group, adapters).astype(jnp.int32), jnp.where(needed, tile, tiles - 1).astype(jnp.int32)
