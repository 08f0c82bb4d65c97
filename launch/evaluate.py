"""Scores a finished run: `python -m launch.evaluate --config=configs/X.py[:arg] --workdir=DIR [--config.a.b=c ...]`.

The command reads the adapter that the run in DIR has written, scores it with the settings of the config's `eval` group
(another split, more texts, ...), prints the scores and writes them to `DIR/evaluation.json`. Bad input is one line on
stderr and exit code 2.

    --long=sliding,positions,price,passkey,kv   long-context scores too, by the settings of `eval.long`; their tables
                                                and heat maps are in DIR/long_context
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from launch import command, long_context
from launch.main import parse  # and the flags --config and --workdir
from lowrank.adapters import load
from lowrank.core import files, sharding
from lowrank.core.errors import UserError
from lowrank.core.paths import PathLike, as_path, is_folder
from lowrank.training import build, loop, start

_LONG = flags.DEFINE_list("long", [], "Long-context scores: sliding, positions, price, passkey, kv.")


def evaluate(config: Mapping[str, Any], directory: PathLike, long: Sequence[str] = ()) -> dict[str, float]:
    """The scores of the adapter in the run's folder; `long` names those of long contexts.

    Raises UserError if the adapter is missing or fits another model, and for long-context scores that cannot be taken.
    """
    run = build.build_run(config)
    if run.scorer is None:
        raise UserError("eval.split is not set: it names what to score on")
    if long:
        long_context.check(run, long)
    found = as_path(directory) / loop.ADAPTER
    if not is_folder(found):
        raise UserError(f"{directory} holds no finished run: {found} does not exist")
    run = start.with_merged_base(run, as_path(directory))
    assert run.scorer is not None
    if run.objective.comparison:
        run.scorer.remember(run.start_params(run.load().params)[0])
    model = load.load_adapted(found, run.model.name, model=run.options, param_dtype=run.model.param_dtype)
    params = jax.device_put(model.params, sharding.parameter_shardings(model.params, run.mesh))
    scores = run.scorer.scores(params) | run.scorer.texts(params)[0]
    return scores | (long_context.score(run, params, long, directory) if long else {})


def main(argv: Sequence[str]) -> None:
    """Scores the run that the flags describe."""
    del argv
    try:
        scores = evaluate(flags.FLAGS.config.lock(), flags.FLAGS.workdir, _LONG.value)
        files.write_json(as_path(flags.FLAGS.workdir) / "evaluation.json", scores)
    except UserError as e:
        command.fail(e)
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
