"""Each row's family, summary and trained parameters on SmolLM2-135M, and whether it merges.

`python -m experiments.methods.catalogue` writes `results/catalogue.json`.
"""

import functools
import inspect
from pathlib import Path
from typing import Any

import jax

from experiments.methods.rows import ROWS, Row
from lowrank import methods, pretrained
from lowrank.core import files, parameter_summary, tree, weight
from lowrank.core.errors import UserError
from lowrank.core.typing import PyTree

Items = tuple[tuple[str, Any], ...]
MODEL = "smollm2-135m"
RESULTS = Path(__file__).parent / "results" / "catalogue.json"


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """`{row: {family, trains, merges, trained_params}}`, on shapes alone."""
    return {name: entry(row) for name, row in ROWS.items()}


def entry(row: Row, model: str = MODEL) -> dict[str, Any]:
    """One row; `trained_params` is None where the method does not fit the model, with the reason in `why`."""
    group = dict(row.method)
    summary = inspect.getdoc(methods.METHODS[group["name"]]).split("\n\n")[0]
    out = {
        "family": row.family,
        "config": argument(row),
        "trains": " ".join(summary.split()),
        "merges": False,
        "trained_params": None,
    }
    try:
        method = methods.build_method(group)
        upcycled = tuple(row.model.get("upcycle", {}).items())
        base, plain = _shapes(model, tuple(method.model_options.items()), upcycled), _shapes(model, upcycled=upcycled)
        adapted = jax.eval_shape(lambda params: methods.attach(method, params, jax.random.key(0)), base)
        mask = methods.trainable_mask(method, adapted)
    except UserError as e:
        return out | {"why": str(e)}
    trained = parameter_summary.count_parameters(adapted, mask)["trained_params"]
    return out | {"merges": merges(method, adapted, plain), "trained_params": trained}


@functools.cache
def _shapes(model: str, options: Items = (), upcycled: Items = ()) -> PyTree:
    """The model's parameters as shapes; most rows ask for the same."""
    return pretrained.describe(model, model=dict(options), upcycled=dict(upcycled))[2]


def argument(row: Row) -> str:
    """What a config takes after the colon, and the flags beside it."""
    method = ",".join(f"{'method' if k == 'name' else k}={v}" for k, v in row.method.items())
    upcycle = row.model.get("upcycle", {})
    flags = [("optim", *item) for item in row.optim.items()] + [("model.upcycle", *item) for item in upcycle.items()]
    return " ".join([method, *(f"{group}.{k}={v}" for group, k, v in flags)])


def merges(method: methods.Method, adapted: PyTree, plain: PyTree) -> bool:
    """Whether the merged tree is the plain model's: its layers may be in two stacks, and have biases added."""
    try:
        merged = jax.eval_shape(lambda p: weight.merge(method.bind(p, None, None) if method.bind else p), adapted)
    except (UserError, NotImplementedError):
        return False
    names = {name.replace("top/", "layers/") for name in tree.leaf_names(merged) if not name.startswith(methods.SHARED)}
    own = set(tree.leaf_names(plain))
    return own <= names and all(name.endswith("/bias") for name in names - own)


if __name__ == "__main__":
    files.write_json(RESULTS, catalogue())
