"""A config that a run or a study has recorded as JSON: `--config=launch/recorded.py:FILE.json[:CELL]`.

    python -m launch.main --config=launch/recorded.py:runs/headlines/config.json --workdir=runs/again

`FILE.json` is the `config.json` of a run, or the `study.json` of a study, with the key of the cell after a colon.
"""

from ml_collections import ConfigDict

from lowrank.core.errors import UserError, unknown
from lowrank.core.files import read_json


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: the file and, for a study, the key of a cell."""
    if not arg:
        raise UserError("name the file of the config: --config=launch/recorded.py:FILE.json")
    if arg.endswith(".json"):
        return ConfigDict(read_json(arg))
    path, _, key = arg.rpartition(":")
    cells = {cell["key"]: cell["config"] for cell in read_json(path)["cells"]}
    if key not in cells:
        raise unknown("cell", key, cells)
    return ConfigDict(cells[key])
