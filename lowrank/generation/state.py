"""Generation as three pure functions on one state: `prefill` reads prompts, `insert` starts them, `step` goes on.

A row of the state is a place for one text. All that belongs to a text is in arrays with an entry per row: its place
in the cache, its settings, what ends it and its random key. So one program serves all texts, a row that has ended
takes the next prompt, and no setting compiles anything.

Shapes: B rows of the state, n prompts, T prompt positions, N new tokens, E tokens that end a text, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank.core import sharding
from lowrank.core.typing import BatchInfo, Bind, PyTree
from lowrank.generation.sampling import GREEDY, Settings, next_tokens, stack_settings
from lowrank.models import init_cache, kv_cache
from lowrank.models.kv_cache import Cache, Entries

NO_TOKEN = -1  # in place of a token that ends a text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """How each row's text is drawn, and where it ends."""

    max_new_B: jax.Array  # int32: at most this many tokens
    stop_ids_BxE: jax.Array  # int32: the text ends with any of these; NO_TOKEN fills the rest
    key_data_B: jax.Array  # of one random key per row; token i is drawn with the key folded with i
    settings: Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The texts that are being written."""

    cache: Cache
    requests: Requests
    tokens_BxN: jax.Array  # int32: each row's text so far; its last token is not in the cache yet
    count_B: jax.Array  # int32: the tokens of each row's text so far
    active_B: jax.Array  # bool: whether the row's text goes on
    seen_BxV: jax.Array  # bool: the tokens of each row's prompt and text


class Prefilled(NamedTuple):
    """Prompts that the model has read."""

    entries: dict[str, Entries]
    lengths_n: jax.Array  # the number of entries of each, virtual tokens among them
    logits_nxV: jax.Array  # of the first new token
    seen_nxV: jax.Array


def init_state(*args: Any, **kwargs: Any) -> State:
    """A state without texts, of the shapes that `state_shapes` returns for these arguments."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), state_shapes(*args, **kwargs))


def state_shapes(
    model: nn.Module, params: PyTree, rows: int, slots: int, max_new: int, stops: int, bind: Bind | None = None
) -> State:
    """The shapes of a state for `rows` texts of up to `max_new` tokens, in `slots` together with their prompts.

    `stops` is the largest number of tokens that end a text. `params` may be shapes. On a mesh, the rows and heads of
    the cache are sharded, and all else is on every device, so that each process can read it.
    """
    tokens, lengths = jax.ShapeDtypeStruct((rows, 1), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    read = jax.eval_shape(
        lambda params, *prompts: prefill(model, params, *prompts, slots, bind), params, tokens, lengths
    )
    gates = {name: e.gates for name, e in read.entries.items() if e.gates is not None}
    keys = jax.eval_shape(lambda: jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(0), rows)))
    cache = jax.eval_shape(lambda: init_cache(model.config, rows, slots))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype)  # noqa: E731
    settings = jax.tree.map(lambda x: array(x.dtype), stack_settings([GREEDY]))
    state = State(
        dataclasses.replace(cache, gates=gates),
        Requests(array(jnp.int32), array(jnp.int32, stops), keys, settings),
        array(jnp.int32, max_new),
        array(jnp.int32),
        array(bool),
        array(bool, read.logits_nxV.shape[-1]),
    )
    mesh = sharding.mesh_of(params)
    return state if mesh is None else jax.tree.map(lambda x: _placed(x, mesh), state)


def _placed(x: jax.ShapeDtypeStruct, mesh: Any) -> jax.ShapeDtypeStruct:
    spec = sharding.slots_spec(x.shape, mesh) if _is_slots(x) else sharding.P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))


def prefill(
    model: nn.Module,
    params: PyTree,
    tokens_nxT: jax.Array,
    lengths_n: jax.Array,
    slots: int,
    bind: Bind | None = None,
) -> Prefilled:
    """Prompts, padded on the right, as the model reads them for a state whose cache has this many `slots`.

    `bind`, a method's, is given the prompts as its batch.
    """
    n, T = tokens_nxT.shape
    real_nxT = jnp.arange(T)[None] < lengths_n[:, None]
    params = bind(params, BatchInfo(real_nxT.astype(jnp.int32)), None) if bind else params
    h_nxTxD, entries = model.apply({"params": params}, tokens_nxT, slots, method="prefill")
    last_nx1xD = jnp.take_along_axis(h_nxTxD, jnp.maximum(lengths_n - 1, 0)[:, None, None], axis=1)
    logits_nxV = _logits(model, params, last_nx1xD)
    V = logits_nxV.shape[-1]
    seen_nxV = (
        jnp.zeros((n, V), bool).at[jnp.arange(n)[:, None], jnp.where(real_nxT, tokens_nxT, V)].set(True, mode="drop")
    )
    return Prefilled(entries, lengths_n + model.config.num_virtual_tokens, logits_nxV, seen_nxV)


def insert(state: State, prefilled: Prefilled, rows_n: jax.Array, requests: Requests) -> State:
    """The state with prompts in the rows `rows`, whose first tokens are drawn; a row beyond the last is dropped."""
    put = lambda all_rows, new: all_rows.at[rows_n].set(new, mode="drop")  # noqa: E731
    first = len(rows_n)
    state = State(
        kv_cache.insert_rows(state.cache, prefilled.entries, rows_n, prefilled.lengths_n),
        jax.tree.map(put, state.requests, requests),
        state.tokens_BxN,
        put(state.count_B, jnp.zeros(first, jnp.int32)),
        put(state.active_B, jnp.ones(first, bool)),
        put(state.seen_BxV, prefilled.seen_nxV),
    )
    return _draw(state, prefilled.logits_nxV, rows_n)


def bind_for_steps(params: PyTree, state: State, bind: Bind | None) -> PyTree:
    """`params` with a method's `bind` applied, for `step`.

    Its batch is one token per row: the gates of a router come from the prompts, and are in the cache.
    """
    return bind(params, BatchInfo(jnp.ones((len(state.count_B), 1), jnp.int32)), None) if bind else params


def step(model: nn.Module, params: PyTree, state: State) -> State:
    """The state with one more token of each active row; the other rows stay as they are."""
    rows_B, count_B = jnp.arange(len(state.count_B)), state.count_B
    last_Bx1 = state.tokens_BxN[rows_B, jnp.maximum(count_B - 1, 0)][:, None]
    idle = dataclasses.replace(state.cache, index_B=jnp.where(state.active_B, state.cache.index_B, 0))
    h_Bx1xD, cache = model.apply({"params": params}, last_Bx1, idle, method="extend")  # type: ignore[misc]
    return _draw(dataclasses.replace(state, cache=cache), _logits(model, params, h_Bx1xD), rows_B)


def release(state: State, row: jax.Array) -> State:
    """The state without the text of `row`."""
    return dataclasses.replace(state, active_B=state.active_B.at[row].set(False))


def _logits(model: nn.Module, params: PyTree, h_Bx1xD: jax.Array) -> jax.Array:
    logits: Any = model.apply({"params": params}, h_Bx1xD, method="logits")
    return logits[:, 0]


def _draw(state: State, logits_nxV: jax.Array, rows_n: jax.Array) -> State:
    """The state with one more token of those of `rows` that are active, drawn from their logits."""
    count_n, active_n, seen_nxV, r = jax.tree.map(
        lambda x: x.at[rows_n].get(mode="clip"), (state.count_B, state.active_B, state.seen_BxV, state.requests)
    )
    keys_n = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(r.key_data_B), count_n)
    greedy = stack_settings([GREEDY])  # for the others, as a setting of any row costs time
    settings = jax.tree.map(lambda x, y: jnp.where(active_n, x, y), r.settings, greedy)
    token_n = next_tokens(logits_nxV, keys_n, settings, seen_nxV)
    ended_n = jnp.any(token_n[:, None] == r.stop_ids_BxE, axis=-1) | (count_n + 1 >= r.max_new_B)
    at_n = jnp.where(active_n, rows_n, len(state.count_B))  # of an inactive row nothing is written
    state = dataclasses.replace(
        state,
        tokens_BxN=state.tokens_BxN.at[at_n, count_n].set(token_n, mode="drop"),
        count_B=state.count_B.at[at_n].add(1, mode="drop"),
        active_B=state.active_B.at[at_n].set(~ended_n, mode="drop"),
        seen_BxV=state.seen_BxV.at[at_n, token_n].set(True, mode="drop"),
    )
    return placed(state)


def placed(state: State) -> State:
    """The state over the program's mesh: the slots of the cache sharded, all else on every device.

    A program that returns it from a loop places it once more behind the loop, where the compiler would choose.
    """
    return jax.tree.map(lambda x: sharding.shard_slots(x) if _is_slots(x) else sharding.replicate(x), state)


def _is_slots(x: Any) -> bool:
    """Whether an array of the state holds keys or values, `[L, B, K, S, H]`."""
    return x.ndim == 5
