"""The moves that bring a model into a reference's order, found a layer at a time, and applied as its tensors are read.

A layer's symmetries: the units of the MLP; the groups of heads with one key and value, the query heads in a group, and
the dimensions of its values; without a rope, the dimensions of queries and keys. With `residual`, also the one order of
the residual stream, which all layers share and fine-tunes of one base have in common.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.linalg

from lowrank.core.errors import UserError
from lowrank.merging.alignment import matching
from lowrank.merging.alignment.layers import Model, Place
from lowrank.merging.alignment.options import Options
from lowrank.merging.checkpoint import Checkpoint
from lowrank.merging.model_spec import ModelSpec
from lowrank.merging.plan import Input

READERS = re.compile(
    r"(attn/(q|k|v|qkv)|mlp/(up|gate|gate_up)|head|head/dense|pooler)/kernel"
)  # of the residual stream
WRITERS = re.compile(r"(attn/o|mlp/down)/(kernel|bias)")
TABLES = re.compile(r"embed/(embedding|positions|types)")
ROUNDS = 10
Models = Mapping[ModelSpec, Checkpoint]


class Moves:
    """What is done to each tensor: along an axis, an order `[n]` of its entries, or a mixture `[n, m]` of them."""

    def __init__(self) -> None:
        self.of: dict[str, dict[int, np.ndarray]] = {}

    def add(self, name: str, axis: int, move: np.ndarray) -> None:
        """Adds a move along an axis that has none, or replaces it."""
        self.of.setdefault(name, {})[axis] = move

    def apply(self, name: str, values: np.ndarray) -> np.ndarray:
        """A tensor of the model in the reference's order."""
        for axis, move in self.of.get(name, {}).items():
            if move.ndim == 1 and not np.array_equal(move, np.arange(len(move))):
                values = np.take(values, move, axis)
            elif move.ndim == 2:
                values = np.moveaxis(np.tensordot(move.astype(values.dtype), values, (1, axis)), 0, axis)
        return np.ascontiguousarray(values)

    @property
    def moved(self) -> float:
        """The share of places in all orders that another unit takes; a mixture counts its largest part."""
        orders = [move if move.ndim == 1 else move.argmax(1) for axes in self.of.values() for move in axes.values()]
        return float(np.mean(np.concatenate([o != np.arange(len(o)) for o in orders]))) if orders else 0.0


def find_moves(reference: Checkpoint, model: Checkpoint, options: Options) -> Moves:
    """The moves of `model` into the order of `reference`. Both are read a layer at a time.

    Raises UserError for models of other shapes; only a transport may change the width of MLPs.
    """
    ours, theirs = Model(reference), Model(model)
    check_shapes(ours, theirs, options)
    moves = Moves()
    for step in range(ROUNDS if options.residual else 1):
        before = _residual_order(theirs, moves)
        if options.residual:
            _match_residual(ours, theirs, moves, inner=step > 0)
            if step and np.array_equal(before, _residual_order(theirs, moves)):
                break
        stream = _stream_moves(theirs, moves)
        for layer in range(ours.depth):
            _match_layer(ours, theirs, layer, moves, stream, options)
    return moves


def check_shapes(ours: Model, theirs: Model, options: Options) -> None:
    """Raises UserError for models between which there are no moves."""
    for name in ("depth", "width", "heads", "groups", "head_dim", *([] if options.units.mixes else ["units"])):
        a, b = getattr(ours, name), getattr(theirs, name)
        if a != b:
            remedy = ": align by method: transport" if name == "units" else ""
            raise UserError(f"{ours.spec} has {name}={a} and {theirs.spec} {name}={b}, which cannot be aligned{remedy}")


def _match_layer(ours: Model, theirs: Model, layer: int, moves: Moves, stream: Moves, options: Options) -> None:
    """Finds the moves of a layer's heads and units, with those of the residual `stream` as they are."""
    a = ours.layer(layer, ours.checkpoint.read)
    b = theirs.layer(layer, lambda name: stream.apply(name, theirs.checkpoint.read(name)))
    order = matching.match_heads(a, b, ours.free_keys(layer))
    reads, writes = options.units.match(a, b, options.regularization)
    add_layer(moves, theirs, layer, order, reads, writes)


def add_layer(
    moves: Moves, model: Model, layer: int, order: matching.HeadOrder, reads: np.ndarray, writes: np.ndarray
) -> None:
    """Adds the moves of a layer's heads, and of its MLP's units: of what these read, and of what they write."""
    for place, axis, move in _head_moves(model, layer, order):
        moves.add(place.name, axis, move)
    both = np.concatenate([reads, reads + model.units]) if reads.ndim == 1 else scipy.linalg.block_diag(reads, reads)
    for leaf, move in (("gate", reads), ("up", reads), ("gate_up", both)):
        for part in ("kernel", "bias"):
            if rows := model.place(layer, f"mlp/{leaf}/{part}"):
                moves.add(rows.name, rows.out if part == "kernel" else 0, move)
    if down := model.place(layer, "mlp/down/kernel"):
        moves.add(down.name, down.into, writes)


def _head_moves(model: Model, layer: int, order: matching.HeadOrder) -> Iterator[tuple[Place, int, np.ndarray]]:
    K, d = model.groups, model.head_dim
    G = model.heads // K
    heads = order.groups[:, None] * G + order.heads  # [K, G] places of the model's heads
    of_keys, of_values = (order.groups[:, None] * d + x for x in (order.keys, order.values))
    q, o = ((heads[..., None] * d + x[:, None]).reshape(-1) for x in (order.keys, order.values))
    rows = {"q": q, "k": of_keys.reshape(-1), "v": of_values.reshape(-1)}
    shifts = np.cumsum([0, K * G * d, K * d])
    rows["qkv"] = np.concatenate([rows[n] + s for n, s in zip("qkv", shifts, strict=True)])
    for name, move in rows.items():
        for part in ("kernel", "bias"):
            if place := model.place(layer, f"attn/{name}/{part}"):
                yield place, place.out if part == "kernel" else 0, move
        if model.config_flag("wide_qk_norm") and (norm := model.place(layer, f"attn/{name}_norm/scale")):
            yield norm, 0, move
    if output := model.place(layer, "attn/o/kernel"):
        yield output, output.into, o


def _stream(model: Model) -> Iterator[tuple[Place, int, bool]]:
    """`(place, axis, whether it is in a layer)` of everything that reads or writes the residual stream."""
    pooled = any(leaf.startswith("pooler") for leaf in model.outer)
    places = [(leaf, place, False) for leaf, place in model.outer.items() if not (pooled and leaf.startswith("head"))]
    for layer in range(model.depth):
        places += [(leaf, p, True) for leaf in model.leaves if (p := model.place(layer, leaf))]
    for leaf, place, inner in places:
        if TABLES.fullmatch(leaf):
            yield place, 1, inner
        elif READERS.fullmatch(leaf):
            yield place, place.into, inner
        elif WRITERS.fullmatch(leaf):
            yield place, place.out if leaf.endswith("kernel") else 0, inner
        elif leaf.endswith(("norm/scale", "norm/bias")) and not leaf.startswith(("attn/", "head")):
            yield place, 0, inner


def _stream_moves(model: Model, moves: Moves) -> Moves:
    """Those of the moves that are of the residual stream."""
    found = Moves()
    for place, axis, _ in _stream(model):
        if (move := moves.of.get(place.name, {}).get(axis)) is not None:
            found.add(place.name, axis, move)
    return found


def _residual_order(model: Model, moves: Moves) -> np.ndarray:
    place, axis, _ = next(_stream(model))
    return moves.of.get(place.name, {}).get(axis, np.arange(model.width))


def _match_residual(ours: Model, theirs: Model, moves: Moves, *, inner: bool) -> None:
    """Finds the order of the residual stream from all that touches it, at first only from what is outside of layers."""
    gain: Any = 0.0
    stream = list(_stream(theirs))
    for (place, axis, in_layer), (our_place, our_axis, _) in zip(stream, _stream(ours), strict=True):
        if in_layer and not inner:
            continue
        rest = Moves()
        rest.of[place.name] = {a: m for a, m in moves.of.get(place.name, {}).items() if a != axis}
        theirs_moved = np.moveaxis(rest.apply(place.name, theirs.checkpoint.read(place.name)), axis, 0)
        gain = gain + matching.products(np.moveaxis(ours.checkpoint.read(our_place.name), our_axis, 0), theirs_moved)
    order = matching.assign(gain)
    for place, axis, _ in stream:
        moves.add(place.name, axis, order)


def check_all(models: Models, reference: Checkpoint, options: Options, shapes: dict[Input, tuple[int, ...]]) -> None:
    """Raises UserError for models that cannot be aligned, and gives `shapes` those that a transport will make."""
    ours = Model(reference)
    for spec, checkpoint in models.items():
        theirs = Model(checkpoint)
        check_shapes(ours, theirs, options)
        for layer in range(ours.depth) if theirs.units != ours.units else ():
            for leaf in (leaf for leaf in theirs.leaves if leaf.startswith("mlp/")):
                place, target = theirs.place(layer, leaf), ours.place(layer, leaf)
                if place and target:
                    shapes[Input(spec, place.name)] = shapes[Input(reference.spec, target.name)]


def align_all(models: Models, reference: Checkpoint, options: Options) -> dict[str, Any]:
    """Aligns every model to the reference: each reads its tensors in the reference's order from now on.

    Returns `{model: share of the places of all orders that another unit takes}`.
    """
    report = {}
    for spec, checkpoint in models.items():
        if checkpoint is not reference:
            moves = find_moves(reference, checkpoint, options)
            checkpoint.changes.append(moves.apply)
            report[str(spec)] = moves.moved
    return report
