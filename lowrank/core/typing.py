"""The types that the whole package shares: trees, batches, arrays by name, and the signatures of callables."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

PyTree = Any  # a pytree of arrays, shapes or forms
Arrays = dict[str, jax.Array]  # leaf name -> array
HostArrays = dict[str, np.ndarray]  # name -> array in the host's memory
Batch = Mapping[str, Any]  # name -> array of a batch
Sums = tuple[jax.Array, jax.Array]  # (sum of weighted losses, sum of weights), float32 scalars
Bind = Callable[[PyTree, Any, jax.Array | None], PyTree]  # (params, batch or None, rng or None) -> params
