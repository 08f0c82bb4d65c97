"""The positions of a model's tokens: the options of rope and of windows, the ropes of layers, and their tables.

Shapes: L layers, B rows, T tokens, F frequencies.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError, plural
from lowrank.kernels.attention.mask import Mask
from lowrank.models import rope
from lowrank.models.context import check_context, stretched_rope
from lowrank.models.rope_scaling import KINDS, RopeScaling, check_scaling

Rope = tuple[float, RopeScaling | None] | None  # (theta, scaling); None: no rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """The options of a model's positions: a table or rope, and the windows of its layers."""

    learned_positions: bool = False  # a position table instead of rope
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_layers: tuple[bool, ...] = ()  # whether each layer has rope; (): all have, without learned positions
    rotary_dim: int = 0  # rope turns this many dimensions of a head; 0: all
    window: int = 0  # in local layers a token sees this many tokens, itself included; 0: all are global
    local_layers: tuple[bool, ...] = ()  # whether each layer is local; (): all are, if there is a window
    local_rope_theta: float = 0.0  # rope_theta of local layers, without scaling; 0: that of the others

    @property
    def mixed(self) -> bool:
        """Whether local and global layers alternate."""
        return self.window > 0 and bool(self.local_layers) and not all(self.local_layers)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rope of each layer."""
        layers: int = self.layers  # type: ignore[attr-defined]  # a model config's field
        local = self.local_layers or (True,) * layers if self.window else (False,) * layers
        has_rope = self.rope_layers or (not self.learned_positions,) * layers
        far = stretched_rope(self)
        near = (self.local_rope_theta, None) if self.local_rope_theta else far
        return tuple((near if x else far) if on else None for x, on in zip(local, has_rope, strict=True))


def check_position_options(config: Any) -> None:
    """Raises UserError for options that the layers and heads of `config` cannot have."""
    for name in ("local_layers", "rope_layers"):
        given = getattr(config, name)
        if given and len(given) != config.layers:
            raise UserError(f"{name} has {plural(len(given), 'value')} for layers={config.layers}")
    if config.rotary_dim % 2 or not 0 <= config.rotary_dim <= config.head_dim:
        raise UserError(f"rotary_dim={config.rotary_dim} is not an even number up to head_dim={config.head_dim}")
    check_context(config)
    theta, scaling = stretched_rope(config)
    for name, value in {"rope_theta": theta, "local_rope_theta": config.local_rope_theta or theta}.items():
        if not 1e-38 < value < 1e38:  # its powers are float32
            raise UserError(f"{name}={value} turns no position: give a number between 1e-38 and 1e38")
    if scaling is not None:
        check_scaling(scaling, config.rotary_dim or config.head_dim, theta)


class LayerKind(NamedTuple):
    """The kind of a layer, or `[L]` of each layer of a stack; None where all layers of the model are alike."""

    local: Any = None  # bool: the window applies
    rope: Any = None  # int32: the index of its rope tables
    normed: Any = None  # bool: attention reads the normalized residual stream


def layer_kinds(config: Any, first: int = 0, count: int | None = None) -> LayerKind:
    """The kinds of `count` layers from `first` on; of all that follow by default."""
    ropes, part = config.ropes, slice(first, None if count is None else first + count)
    tables = list(dict.fromkeys(ropes))
    local = jnp.array(config.local_layers[part], bool) if config.mixed else None
    index = jnp.array([tables.index(r) for r in ropes[part]], jnp.int32) if len(tables) > 1 else None
    normed = None if getattr(config, "first_norm", True) else jnp.arange(config.layers)[part] > 0
    return LayerKind(local, index, normed)


def rope_inputs(
    c: Any, positions_BxT: jax.Array, mask: Mask, slots: int = 0
) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
    """The tables `(cos, sin)` `[B, T, 1, F]`, with an axis in front for the distinct `ropes` if there are several.

    `slots` is the length of a cache, 0 without one.
    """
    ropes = dict.fromkeys(c.ropes)
    if list(ropes) == [None]:
        return None, None

    def last_positions() -> jax.Array:
        if slots:
            return jnp.full(1, slots - 1)
        segments = mask.queries.segments
        return jnp.max(positions_BxT if segments is None else positions_BxT * (segments != 0), axis=1)

    tables = [_rope_tables(c, positions_BxT, kind, last_positions) for kind in ropes]
    return tables[0] if len(tables) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *tables)


def _rope_tables(
    c: Any, positions_BxT: jax.Array, kind: Rope, last_positions: Callable[[], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """`(cos, sin)` `[B, T, 1, F]`; `last_positions` computes the largest position of each row, `[B]` or `[1]`."""
    width = c.rotary_dim or c.head_dim
    if kind is None:
        ones = jnp.ones((*positions_BxT.shape, 1, width // 2), jnp.float32)
        return ones, jnp.zeros_like(ones)
    theta, scaling = kind
    by_length = scaling is not None and KINDS[scaling.kind].by_length
    lengths_Bx1 = last_positions()[:, None] + 1 if by_length else 0
    frequencies = rope.rope_frequencies(width, theta, scaling, lengths_Bx1)
    cos, sin = rope.rope_tables(positions_BxT, frequencies)
    factor = scaling.of_cosines if scaling else 1.0
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)
