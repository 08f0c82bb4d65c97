"""Trained parameters by arithmetic on abstract shapes, beside what papers print: `python -m experiments.counts`.

No weight is made: the models exist as shapes alone, so GPT-3 is counted in a second. Writes `results/counts.json`.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.counts.papers import CASES, Case
from experiments.plan.paper_models import MODELS
from lowrank import methods, models
from lowrank.core import config_schema, files, parameter_summary

RESULTS = Path(__file__).parent / "results" / "counts.json"


def shapes(model: Any) -> Any:
    """The parameters of a model as shapes: those its config describes, or one kernel `(in, out)`."""
    if isinstance(model, tuple):
        return {"kernel": jax.ShapeDtypeStruct(model, jnp.float32)}
    network, tokens = models.build_model(model), jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), tokens))["params"]


def count(model: Any, group: dict[str, Any]) -> dict[str, float]:
    """`lowrank.core.parameter_summary.count_parameters` of a method on a model, on shapes."""
    method = methods.build_method(group)
    base = shapes(config_schema.replace_fields(model, method.model_options, "model") if method.model_options else model)
    adapted = jax.eval_shape(lambda params: methods.attach(method, params, jax.random.key(0)), base)
    return parameter_summary.count_parameters(adapted, methods.trainable_mask(method, adapted))


def rows() -> list[dict[str, Any]]:
    """One row for each printed figure: ours, and the source's beside it."""
    return [_row(case, count(MODELS[case.model], case.method)) for case in CASES]


def _row(case: Case, sums: dict[str, float]) -> dict[str, Any]:
    ours = {key: sums[key] for key in ("trained_params", "trained_percent")}
    said = {"printed": case.printed, "source": case.source}
    return {"model": case.model, "method": case.what, "config": case.method, **ours, **said}


if __name__ == "__main__":
    files.write_json(RESULTS, rows())
    print(RESULTS.read_text())
