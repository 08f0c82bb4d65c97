"""Feature-based fine-tuning: the backbone is fixed, and computed once per example."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.typing import Batch, PyTree
from lowrank.methods.method import Hooks, Method


def features() -> Method:
    """Trains the head of a classifier alone, on pooled features `[B, D]` that are computed once per example and cached.

    See the comparison of BERT's authors (Devlin et al. 2019, arXiv:1810.04805, section 5.3) and Peters et al. 2019,
    arXiv:1903.05987. The results are those of `head`, without the forward pass of the backbone from the second epoch
    on. The cache is in host memory: D float32 numbers per example.

    Differs from the paper: a linear head reads the pooled features of the last layer, where BERT's authors train two
    BiLSTM layers on the features that several layers have of each token.
    """
    return Method(trainable=("head/.*",), hooks=Hooks(map_batch=FeatureCache))


class FeatureCache:
    """Turns batches of tokens into batches of pooled features, which are cached by the tokens of each example."""

    def __init__(self, network: Any, frozen: PyTree) -> None:
        """`frozen` has None where a leaf is trained.

        Raises UserError for a trained backbone, and for a run of several processes.
        """
        if jax.process_count() > 1:
            raise UserError("method features caches in one host's memory: start one process, or use method head")
        for name, leaf in tree.named_leaves(frozen, lambda x: x is None):
            if leaf is None and not name.startswith("head/"):
                raise UserError(f"method features computes the backbone once, so it cannot train {name}")
        self._params, self._rows = frozen, dict[bytes, np.ndarray]()
        self._pooled = jax.jit(lambda p, t, s: network.apply({"params": p}, t, segments=s, method="pooled"))

    def __call__(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """The batch with `pooled` float32 `[B, D]` in place of its tokens."""
        keys = [t[s > 0].tobytes() for t, s in zip(batch["tokens"], batch["segments"], strict=True)]
        if not all(key in self._rows for key in keys):
            found = self._pooled(self._params, batch["tokens"], batch["segments"])
            self._rows |= dict(zip(keys, np.asarray(found, np.float32), strict=True))
        rest = {name: x for name, x in batch.items() if name not in ("tokens", "segments")}
        return {**rest, "pooled": np.stack([self._rows[key] for key in keys])}
