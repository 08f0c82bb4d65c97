"""A model that reads rows of tokens for scores: the losses of its predictions, and the tokens that it would write.

Shapes: B rows of a batch, T tokens, D width, A places of a row.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank.core import sharding
from lowrank.core.typing import BatchInfo, Bind, HostArrays, Network, PyTree
from lowrank.kernels.cross_entropy import chunked_token_nll

PER_TOKEN = ("tokens", "targets", "positions", "segments")
CHUNK_TOKENS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """A network with parameters, and how rows are given to it.

    `bind` is a method's, `rows` are those of a batch, and about `chunk_tokens` tokens have their logits in memory at a
    time; 0: all of a batch's. The devices are those of the `mesh`, of which `rows` must be a multiple.
    """

    network: Network
    params: PyTree
    bind: Bind | None = None
    mesh: Mesh | None = None
    rows: int = 4
    chunk_tokens: int = CHUNK_TOKENS

    def token_nll(self, rows: Sequence[np.ndarray], length: int) -> Iterator[np.ndarray]:
        """For each row of N + 1 token ids, N <= `length`, the losses in nats of predicting its last N, float32 `[N]`.

        The rows are read in batches of `length` tokens, so that there is one program.
        """
        length = self._of_shards(length)
        for some, filled in self._batches(rows):
            batch = _padded([row[:-1] for row in some], length)
            batch["targets"] = _padded([row[1:] for row in some], length)["tokens"]
            found = self._run(_token_nll, self.chunk_tokens, batch)
            for row, nll_T in zip(some[:filled], found[:filled], strict=True):
                yield nll_T[: len(row) - 1]

    def greedy(self, rows: Sequence[np.ndarray], count: int, length: int) -> Iterator[np.ndarray]:
        """For each row of token ids, the most likely tokens in place of its last `count` and after them.

        int32 `[count + 1]`. The first `count` of them are those of the row if and only if the row without them is
        continued by them, one greedy token after the other.
        """
        for some, filled in self._batches(rows):
            places = np.array([len(row) - 1 - count for row in some], np.int32)[:, None] + np.arange(count + 1)
            batch = _padded(some, self._of_shards(length)) | {"places": places.astype(np.int32)}
            yield from self._run(_greedy, batch)[:filled]

    def _of_shards(self, length: int) -> int:
        """The length, rounded up so that the mesh's axis `context` divides it."""
        return length + -length % (self.mesh.shape["context"] if self.mesh else 1)

    def _batches(self, rows: Sequence[np.ndarray]) -> Iterator[tuple[list[np.ndarray], int]]:
        """Batches of `self.rows` rows, of which the last is filled up with copies, and how many are none."""
        for start in range(0, len(rows), self.rows):
            some = list(rows[start : start + self.rows])
            yield some + [some[-1]] * (self.rows - len(some)), len(some)

    def _run(self, program: Callable[..., jax.Array], *arguments: Any) -> np.ndarray:
        *static, batch = arguments
        put = partial(sharding.make_global_batch, mesh=self.mesh, per_token=PER_TOKEN) if self.mesh else dict
        with sharding.mesh_context(self.params):
            return np.asarray(program(self.network, self.bind, *static, self.params, put(batch)))


def _padded(rows: Sequence[np.ndarray], length: int) -> HostArrays:
    """Rows as one batch of segments of 1, with padding at the end."""
    real_BxT = np.arange(length) < np.array([len(row) for row in rows])[:, None]
    tokens_BxT = np.zeros(real_BxT.shape, np.int32)
    for row, ids in zip(tokens_BxT, rows, strict=True):
        row[: len(ids)] = ids
    positions_BxT = np.where(real_BxT, np.arange(length), 0)
    arrays = {"positions": positions_BxT.astype(np.int32), "segments": real_BxT.astype(np.int32)}
    return {"tokens": tokens_BxT, **arrays}


def _features(network, bind, params, batch):
    """`(hidden states [B, T, D], the head that makes them logits [..., V])`."""
    params = bind(params, BatchInfo(batch["segments"]), None) if bind else params
    inputs = (batch["tokens"], batch["positions"], batch["segments"])
    h_BxTxD = network.apply({"params": params}, *inputs, method="features")
    return h_BxTxD, partial(network.apply, {"params": params}, method="logits")


@partial(jax.jit, static_argnums=(0, 1, 2))
def _token_nll(network, bind, chunk_tokens, params, batch):
    h_BxTxD, head = _features(network, bind, params, batch)
    real_BxT = batch["segments"].astype(jnp.float32)
    chunk_tokens = chunk_tokens or real_BxT.size
    return sharding.replicate(chunked_token_nll(head, h_BxTxD, batch["targets"], real_BxT, chunk_tokens))


@partial(jax.jit, static_argnums=(0, 1))
def _greedy(network, bind, params, batch):
    h_BxTxD, head = _features(network, bind, params, batch)
    h_BxAxD = jnp.take_along_axis(h_BxTxD, batch["places"][..., None], axis=1)
    return sharding.replicate(jnp.argmax(head(h_BxAxD), axis=-1).astype(jnp.int32))
