"""The flags of the commands that read an adapter, from the folder of a run or of an adapter."""

from absl import flags

from launch.run_adapter import adapter_of_run
from lowrank.adapters import load
from lowrank.core.errors import UserError
from lowrank.core.paths import AnyPath, as_path
from lowrank.pretrained import Pretrained

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a finished run, whose adapter is read.")
_ADAPTER = flags.DEFINE_string(
    "adapter", None, "The folder of an adapter, or its hub id ORG/NAME[@REVISION], in place of --workdir."
)
_BASE = flags.DEFINE_string("base", None, "The model, if not the one that the adapter records.")
_ANY_BASE = flags.DEFINE_bool("any_base", False, "Attach the adapter even if it records another base.")


def adapted() -> Pretrained:
    """The model with the adapter that the flags name. Raises UserError as `adapters.load.load_adapted` does."""
    directory, spec = _source()
    return load.load_adapted(directory, spec, any_base=_ANY_BASE.value)


def _source() -> tuple[AnyPath, str | None]:
    """`(folder of the adapter, name of the model or None)`."""
    if bool(_WORKDIR.value) == bool(_ADAPTER.value):
        raise UserError("the adapter comes from one folder: give either --workdir=RUN or --adapter=DIR")
    if _ADAPTER.value:
        return as_path(_ADAPTER.value), _BASE.value
    folder, model = adapter_of_run(_WORKDIR.value)
    return folder, _BASE.value or model
