"""An embedding of which a few rows are learned; they hold values, not differences, as PEFT's trainable tokens do."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core import weight
from lowrank.core.weight import KERNEL, Weight, form, frozen, materialize, trainable


@form
class TrainableTokens(Weight):
    """`base` `[..., V, D]` with the rows `ids` `[..., n]` replaced by `rows` `[..., n, D]`."""

    base: Any = frozen(axes=KERNEL)
    ids: jax.Array = frozen()  # int32, distinct
    rows: jax.Array = trainable(decay=False)

    def materialize(self) -> jax.Array:
        """The whole table; what a tied head multiplies by."""
        base = materialize(self.base)
        return _set(base, self.ids, self.rows.astype(base.dtype))

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of the table without forming it."""
        plain = weight.take(self.base, ids)
        hit = ids[..., None] == self.ids.reshape((1,) * ids.ndim + (-1,))
        learned = jnp.take(self.rows, jnp.argmax(hit, axis=-1), axis=0).astype(plain.dtype)
        return jnp.where(jnp.any(hit, axis=-1)[..., None], learned, plain)


_set = jnp.vectorize(lambda table, ids, rows: table.at[ids].set(rows), signature="(v,d),(n),(n,d)->(v,d)")


def attach(w: Any, ids: jax.Array) -> TrainableTokens:
    """A Rows on `w` `[..., V, D]` that starts as the identity; `ids` `[..., n]`."""
    rows = jnp.take_along_axis(materialize(w), ids[..., None], axis=-2)
    return TrainableTokens(base=w, ids=ids, rows=rows.astype(jnp.float32))
