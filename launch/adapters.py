"""The adapter that a run has written, and the flags of the commands that read one."""

import argparse

from lowrank.adapters import load
from lowrank.core import schema
from lowrank.core.errors import UserError
from lowrank.core.json_types import RunConfig
from lowrank.core.paths import AnyPath, PathLike, as_path
from lowrank.pretrained import Pretrained
from lowrank.training import loop, start, workdir


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `adapted` reads."""
    add = parser.add_argument
    add("--workdir", help="the folder of a finished run, whose adapter is read")
    add("--adapter", help="the folder of an adapter, or its hub id ORG/NAME[@REVISION], in place of --workdir")
    add("--base", help="the model, if not the one that the adapter records")
    add("--any_base", action="store_true", help="attach the adapter even if it records another base")


def adapted(options: argparse.Namespace) -> Pretrained:
    """The model with the adapter that the flags name. Raises UserError as `adapters.load.load_adapted` does."""
    directory, spec = _source(options)
    return load.load_adapted(directory, spec, any_base=options.any_base)


def adapter_of_run(directory: PathLike) -> tuple[AnyPath, str]:
    """`(folder of the adapter, name of its model)`. Raises UserError for a folder that is not that of a run."""
    try:
        model = schema.decode(as_path(directory) / workdir.CONFIG, RunConfig)["model"]["name"]
    except UserError as e:
        raise UserError(f"{directory} is not the folder of a run: {e}") from None
    return as_path(directory) / loop.ADAPTER, start.base_name(as_path(directory), model)


def _source(options: argparse.Namespace) -> tuple[AnyPath, str | None]:
    """`(folder of the adapter, name of the model or None)`."""
    if bool(options.workdir) == bool(options.adapter):
        raise UserError("the adapter comes from one folder: give either --workdir=RUN or --adapter=DIR")
    if options.adapter:
        return as_path(options.adapter), options.base
    folder, model = adapter_of_run(options.workdir)
    return folder, options.base or model
