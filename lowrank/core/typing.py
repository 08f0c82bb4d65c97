"""The types that the whole package shares: trees, batches, arrays by name, and the signatures of callables."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

PyTree = Any  # a pytree of arrays, shapes or forms
Arrays = dict[str, jax.Array]  # leaf name -> array
HostArrays = dict[str, np.ndarray]  # name -> array in the host's memory
Batch = Mapping[str, Any]  # name -> array of a batch


class Sums(NamedTuple):
    """The loss of a batch as float32 sums, so that the sums of microbatches add up to those of the batch."""

    total: jax.Array  # the sum of weighted losses
    weight: jax.Array  # the sum of weights, which the total is divided by
    metrics: Mapping[str, tuple[jax.Array, jax.Array]] = {}  # name -> (sum, weight) of a mean that the log shows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """What a method may know of a batch inside the loss. Shapes: R rows that the model reads, T tokens."""

    segments: jax.Array  # [R, T] int32: the sequence that a token belongs to, 0 for padding
    weight: jax.Array | None = None  # the weight that the loss is divided by; None where texts are generated
    prompt: jax.Array | None = None  # [R, T] bool: the tokens of a sequence before its answer; None without answers


Bind = Callable[[PyTree, BatchInfo | None, jax.Array | None], PyTree]  # (params, batch, rng of training) -> params


class Network(Protocol):
    """A Linen model: its config, and `apply` of its parameters to inputs."""

    config: Any

    def apply(self, variables: Mapping[str, PyTree], *inputs: Any, **options: Any) -> Any:
        """The outputs of the model, or of the `method` that the options name."""


class Tokenizer(Protocol):
    """What the package asks of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """The id of the token that starts a text, if there is one."""

    @property
    def eos_id(self) -> int:
        """The id of the token that ends a text."""

    @property
    def pad_id(self) -> int:
        """The id of the token that fills a row."""

    @property
    def stop_ids(self) -> Sequence[int]:
        """The ids of the tokens that end a generated text."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone."""

    def encode_special(self, text: str) -> list[int]:
        """The ids of `text` with the special tokens that the model expects around it."""

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of `ids`; special tokens are left out unless `special`."""

    def token(self, i: int) -> str:
        """The text of a special token, or the vocabulary's entry of any other; empty where there is none."""

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text` alone, and for each the characters of `text` that it stands for, from and up to."""

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **variables: Any) -> str:
        """The conversation as the chat template writes it; `variables` are further ones of the template."""

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> tuple[str, Sequence[tuple[int, int]]]:
        """As `chat`, with the characters that the template marks as generated."""
