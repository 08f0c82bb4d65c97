"""Many texts on one state: requests take its rows, and a row whose text has ended takes the next request."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lowrank.core import sharding
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import Bind, PyTree
from lowrank.generation import state as states
from lowrank.generation.prompt_batches import bucket, padded, right_pad
from lowrank.generation.sampling import GREEDY, Sampling, stack_settings
from lowrank.generation.state import NO_TOKEN, Requests, State

BATCH = 32  # rows
CHECK = 8  # steps between two looks at the texts of which a string may end one


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how its text is drawn.

    The text ends with any of `stop_ids`, which is part of it, or after `max_new` tokens, or where `is_complete` returns
    True for its tokens, which is asked every `CHECK` steps. `key_data` is the data of a random key.
    """

    ids: Sequence[int]
    max_new: int
    stop_ids: Sequence[int] = ()
    sampling: Sampling = GREEDY
    key_data: np.ndarray | None = None
    is_complete: Callable[[list[int]], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of a state: `rows` texts of at most `max_new` tokens, ended by at most `stops` tokens, in `slots`."""

    rows: int
    slots: int
    max_new: int
    stops: int


def fit(config: Any, requests: Sequence[Request], rows: int = BATCH) -> Sizes:
    """The sizes of a state for requests, rounded up so that similar ones share their programs.

    Raises UserError as `check_request` does.
    """
    for request in requests:
        check_request(config, request)
    rows = even_rows(len(requests), rows)
    longest = max(len(r.ids) + r.max_new for r in requests) + config.num_virtual_tokens
    stops = max(len(set(r.stop_ids)) for r in requests)
    return Sizes(
        rows, padded(longest, config.max_length), bucket(max(r.max_new for r in requests)), 8 * max(1, -(-stops // 8))
    )


def even_rows(count: int, rows: int) -> int:
    """The rows with which `count` texts are as few batches as possible, all of one size."""
    return -(-count // -(-count // rows)) if count else 1


class Generator:
    """A model with a state. It has one program for its steps, and one for the prompts of each length."""

    def __init__(self, model: nn.Module, params: PyTree, sizes: Sizes, bind: Bind | None = None) -> None:
        """`bind`, a method's, is applied to `params` with the prompts as its batch."""
        self.model, self.params, self.sizes, self._bind = model, params, sizes, bind
        with sharding.mesh_context(params):
            self._state = states.init_state(model, params, *dataclasses.astuple(sizes), bind)

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[int]]]:
        """`(index of the request, tokens of its text)` as the texts end. Raises UserError where one does not fit."""
        for request in requests:
            self._check(request)
        pending, rows = list(range(len(requests)))[::-1], dict[int, int]()  # row -> index of its request
        while pending or rows:
            self._fill(requests, pending, rows)
            looks = any(requests[i].is_complete for i in rows.values())
            self._run(CHECK if looks else self.sizes.max_new, pause=bool(pending))
            tokens, count, active = self.read()
            for row, i in sorted(rows.items()):
                text, ends = tokens[row, : count[row]].tolist(), requests[i].is_complete
                if active[row] and not (ends and ends(text)):
                    continue
                if active[row]:
                    self.release(row)
                del rows[row]
                yield i, text

    def stream(self, request: Request) -> Iterator[list[int]]:
        """The tokens of a text so far, after each token. Raises UserError where the request does not fit."""
        self._check(request)
        self._insert([request], [0])
        while True:
            tokens, count, active = self.read()
            yield tokens[0, : count[0]].tolist()
            if not active[0]:
                return
            self._run(1, pause=False)

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(tokens [rows, max_new], their count [rows], whether the text goes on [rows])` of the state."""
        return tuple(np.asarray(x) for x in (self._state.tokens_BxN, self._state.count_B, self._state.active_B))

    def release(self, row: int) -> None:
        """Ends the text of a row."""
        with sharding.mesh_context(self.params):
            self._state = _release(self._state, np.int32(row))

    def _check(self, request: Request) -> None:
        c, sizes = self.model.config, self.sizes
        check_request(c, request)
        slots, stops = len(request.ids) + request.max_new + c.num_virtual_tokens, len(set(request.stop_ids))
        if slots > sizes.slots or request.max_new > sizes.max_new or stops > sizes.stops:
            asked = f"{plural(slots, 'slot')}, {request.max_new} new tokens and {plural(stops, 'stop token')}"
            raise UserError(
                f"a request of {asked} exceeds the state's {sizes}: make a generator with the sizes of `fit`"
            )

    def _fill(self, requests: Sequence[Request], pending: list[int], rows: dict[int, int]) -> None:
        """Gives free rows to pending requests: to many at once where all rows are free, else to one after the other."""
        free = [row for row in range(self.sizes.rows) if row not in rows]
        many = len(free) if not rows else 1
        while free and pending:
            taken = [pending.pop() for _ in range(min(many, len(pending)))]
            places = [free.pop(0) for _ in taken]
            rows |= dict(zip(places, taken, strict=True))
            self._insert([requests[i] for i in taken], places, many)

    def _insert(self, requests: Sequence[Request], rows: Sequence[int], count: int = 1) -> None:
        """Starts requests in rows; the program reads `count` prompts."""
        spare = count - len(requests)
        requests, rows = [*requests, *[requests[-1]] * spare], [*rows, *[self.sizes.rows] * spare]
        c = self.model.config
        length = padded(max(len(r.ids) for r in requests), self.sizes.slots - c.num_virtual_tokens)
        arrays = (*right_pad([r.ids for r in requests], length), np.array(rows, np.int32), self._arrays(requests))
        with sharding.mesh_context(self.params):
            self._state = admit(self.model, self._bind, self.params, self._state, *arrays)

    def _arrays(self, requests: Sequence[Request]) -> Requests:
        data = self._state.requests.key_data_B
        stops = np.full((len(requests), self.sizes.stops), NO_TOKEN, np.int32)
        for row, request in zip(stops, requests, strict=True):
            ids = sorted(set(request.stop_ids))
            row[: len(ids)] = ids
        none = np.zeros(data.shape[1:], data.dtype)
        keys = np.stack([none if r.key_data is None else r.key_data for r in requests])
        max_new = np.array([r.max_new for r in requests], np.int32)
        return Requests(max_new, stops, keys, stack_settings([r.sampling for r in requests]))

    def _run(self, steps: int, pause: bool) -> None:
        with sharding.mesh_context(self.params):
            self._state = decode(self.model, self._bind, self.params, self._state, np.int32(steps), np.bool_(pause))


def lowered(
    model: nn.Module, params: PyTree, sizes: Sizes, longest: int, bind: Bind | None = None
) -> jax.stages.Lowered:
    """The program of `Generator` that reads prompts of up to `longest` tokens into all rows: it takes the most memory.

    `params` may be shapes.
    """
    with sharding.mesh_context(params):
        state = states.state_shapes(model, params, *dataclasses.astuple(sizes), bind)
        ints = jax.ShapeDtypeStruct((sizes.rows,), jnp.int32)
        length = padded(longest, sizes.slots - model.config.num_virtual_tokens)
        tokens = jax.ShapeDtypeStruct((sizes.rows, length), jnp.int32)
        requests = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.requests)
        return admit.lower(model, bind, params, state, tokens, ints, ints, requests)


def check_request(config: Any, request: Request) -> None:
    """Raises UserError for a prompt without tokens, and where the prompt and its text exceed the model's positions."""
    if request.max_new < 1:
        raise UserError(f"max_new={request.max_new} is below 1, the least number of new tokens")
    if not len(request.ids):
        raise UserError("a prompt is empty: generation needs at least one token to continue")
    if len(request.ids) + request.max_new + config.num_virtual_tokens > config.max_length:
        virtual = f" + {plural(config.num_virtual_tokens, 'virtual token')}" if config.num_virtual_tokens else ""
        total = f"a prompt of {plural(len(request.ids), 'token')}{virtual} + max_new={request.max_new}"
        raise UserError(f"{total} exceeds the model's {plural(config.max_length, 'position')}")


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def admit(
    model: nn.Module,
    bind: Bind | None,
    params: PyTree,
    state: State,
    tokens_nxT: jax.Array,
    lengths_n: jax.Array,
    rows_n: jax.Array,
    requests: Requests,
) -> State:
    """`insert` of what `prefill` reads. The state is donated, and written in place."""
    prefilled = states.prefill(model, params, tokens_nxT, lengths_n, state.cache.slots, bind)
    return states.insert(state, prefilled, rows_n, requests)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    model: nn.Module, bind: Bind | None, params: PyTree, state: State, steps: jax.Array, pause: jax.Array
) -> State:
    """At most `steps` times `step`, until all texts have ended, or with `pause` any. The state is donated."""
    params, active = states.bind_for_steps(params, state, bind), jnp.sum(state.active_B)

    def running(carry):
        i, state = carry
        left = jnp.sum(state.active_B)
        return (i < steps) & (left > 0) & (~pause | (left == active))

    _, state = jax.lax.while_loop(
        running, lambda carry: (carry[0] + 1, states.step(model, params, carry[1])), (jnp.int32(0), state)
    )
    return states.placed(state)


_release = jax.jit(states.release, donate_argnums=0)
