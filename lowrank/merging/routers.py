"""The first routers of a mixture: drawn, or directions in which the base's hidden states of given prompts point.

Shapes: L layers, E experts, D width, B rows, T tokens. As in mergekit-moe, the row of an expert is the mean over its
positive prompts less that over its negative ones, of length 1; `hidden` takes the last token's input of each layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lowrank import pretrained
from lowrank.adapters import load
from lowrank.core.errors import UserError, plural
from lowrank.merging import sparsify
from lowrank.merging.checkpoint import Checkpoint
from lowrank.models.layer_stack import stack_depths
from lowrank.models.layerwise import first_inputs, run_layer
from lowrank.models.positions import layer_kinds
from lowrank.pretrained import hf_files

ROWS = 8  # prompts at a time
Prompts = Sequence[Sequence[int]]  # token ids
SHORTEST = 1e-8  # a length below it is not divided by


def _pooled(base: Checkpoint, prompts: Prompts, pool: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """`pool(input [T, D] of a layer, number of tokens)` of every prompt and layer, `[prompts, L, D]` float64."""
    spec = base.spec
    model = load.load_adapted(spec.adapter, spec.path) if spec.adapter else None
    model = model or pretrained.load(spec.path, revision=spec.revision)
    longest, rows = max(map(len, prompts)), []
    kinds = layer_kinds(model.config)
    layers = [(stack, i) for stack, depth in stack_depths(model.config).items() for i in range(depth)]
    for start in range(0, len(prompts), ROWS):
        some = prompts[start : start + ROWS]
        tokens, segments = (np.zeros((ROWS, longest), np.int32) for _ in range(2))
        for row, ids in enumerate(some):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        h, inputs = first_inputs(model.config, model.params, tokens, segments)
        found = []
        for place, (stack, i) in enumerate(layers):
            states = np.asarray(h, np.float64)
            found.append([pool(states[row], len(ids)) for row, ids in enumerate(some)])
            layer = jax.tree.map(lambda x, i=i: x[i], model.params[stack])
            kind = jax.tree.map(lambda x, place=place: x[place], kinds)
            h = run_layer(model.config, layer, h, inputs, kind)
        rows.append(np.moveaxis(np.array(found), 0, 1))
    return np.concatenate(rows)


def _hidden(base: Checkpoint, sets: Sequence[Prompts], pool: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    pooled, first, means = _pooled(base, [ids for some in sets for ids in some], pool), 0, []
    for some in sets:
        means.append(pooled[first : first + len(some)].mean(0))
        first += len(some)
    return np.array(means)


def hidden(base: Checkpoint, sets: Sequence[Prompts]) -> np.ndarray:
    """The mean state of each set's last tokens before each layer, `[sets, L, D]`."""
    return _hidden(base, sets, lambda states, count: states[count - 1])


def hidden_avg(base: Checkpoint, sets: Sequence[Prompts]) -> np.ndarray:
    """The mean state of all tokens of a prompt, and of the prompts."""
    return _hidden(base, sets, lambda states, count: states[:count].mean(0))


def cheap_embed(base: Checkpoint, sets: Sequence[Prompts]) -> np.ndarray:
    """The sum of the tokens' embeddings, of length 1 and the same for each layer."""
    (name,) = [name for name in base.tensors if name.endswith("embed_tokens.weight")]
    table = base.read(name).astype(np.float64)
    sums = np.array([sum(table[list(ids)].sum(0) for ids in some) for some in sets])
    return np.repeat(unit(sums)[:, None], base.depth, axis=1)


PROMPTED: dict[str, Callable[[Checkpoint, Sequence[Prompts]], np.ndarray]] = {
    "hidden": hidden,
    "hidden_last": hidden,
    "hidden_avg": hidden_avg,
    "cheap_embed": cheap_embed,
}
DRAWN: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "random": lambda numbers, shape: numbers.standard_normal(shape),
    "uniform_random": lambda numbers, shape: numbers.uniform(-1, 1, shape) / shape[1] ** 0.5,
}
GATE_MODES = (*PROMPTED, *DRAWN)


def unit(x: np.ndarray) -> np.ndarray:
    """`x` with rows of length 1, except those shorter than 1e-8."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), SHORTEST)


@dataclasses.dataclass(frozen=True)
class Routers:
    """The routers of `count` experts; `positive` and `negative` are their prompts, as token ids."""

    mode: str
    base: Checkpoint
    width: int
    count: int
    seed: int
    positive: Sequence[Prompts] = ()
    negative: Sequence[Prompts] = ()

    def rows(self, layer: int, first: int, stop: int) -> np.ndarray:
        """The rows of experts `first` to `stop` in a layer, float32 `[stop - first, D]`."""
        return self._all[layer][first:stop].astype(np.float32)

    @functools.cached_property
    def _all(self) -> np.ndarray:
        if self.mode in DRAWN:
            layers = [sparsify.generator(self.seed, i, "router") for i in range(self.base.depth)]
            return np.array([DRAWN[self.mode](numbers, (self.count, self.width)) for numbers in layers])
        against = [i for i, prompts in enumerate(self.negative) if prompts]
        found = PROMPTED[self.mode](self.base, [*self.positive, *(self.negative[i] for i in against)])
        found[against] -= found[self.count :]
        return np.moveaxis(unit(found[: self.count]), 0, 1)


def encode(base: Checkpoint, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of prompts after a token that starts a text. Raises UserError for prompts that the model cannot read."""
    tokenizer, config = base.source.tokenizer(), hf_files.parse_config(base.source.where, base.hf_config)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found = [[*start, *ids] for ids in tokenizer.encode_batch(prompts)]
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise UserError(f"the prompt {prompt!r} has no tokens")
        if len(ids) > config.max_length:
            raise UserError(
                f"a prompt has {plural(len(ids), 'token')}, more than the {plural(config.max_length, 'position')} of "
                f"{base.spec}: shorten {prompt[:40]!r}"
            )
    return found
