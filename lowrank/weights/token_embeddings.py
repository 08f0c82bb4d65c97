"""An embedding table with a few learned rows; the rows hold values, not differences, as PEFT's trainable tokens do."""

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
        """The whole table, by which a tied head multiplies, in the base's dtype."""
        base = materialize(self.base)
        return _set(base, self.ids, self.rows.astype(base.dtype))

    def take(self, ids: jax.Array) -> jax.Array:
        """The rows `ids` of the table, without forming the table."""
        base_rows = weight.take(self.base, ids)
        matches = ids[..., None] == self.ids.reshape((1,) * ids.ndim + (-1,))
        learned = jnp.take(self.rows, jnp.argmax(matches, axis=-1), axis=0).astype(base_rows.dtype)
        return jnp.where(jnp.any(matches, axis=-1)[..., None], learned, base_rows)


_set = jnp.vectorize(lambda table, ids, rows: table.at[ids].set(rows), signature="(v,d),(n),(n,d)->(v,d)")


def attach(w: Any, ids: jax.Array) -> TrainableTokens:
    """A TrainableTokens on `w` `[..., V, D]` with the distinct `ids` `[..., n]`, which starts as the identity."""
    rows = jnp.take_along_axis(materialize(w), ids[..., None], axis=-2)
    return TrainableTokens(base=w, ids=ids, rows=rows.astype(jnp.float32))
