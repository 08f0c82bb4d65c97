"""The features that a prepared dataset declares, checked before TFDS reads them.

TFDS imports the module of a feature class that a `features.json` names: a dataset could have its own code run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lowrank.core.errors import UserError, nearest
from lowrank.core.files import parse_json, read_json

FEATURES = "features.json"
OWN = "tensorflow_datasets.core.features."


def check_features(folder: Path) -> None:
    """Raises UserError for a `features.json` in or below `folder` with a feature class that is not TFDS's own."""
    for path in sorted(folder.rglob(FEATURES)) if folder.is_dir() else ():
        for name in _class_names(read_json(path)):
            if not _is_own(name):
                known = (kind for kind in vars(tfds.features) if kind[0].isupper())
                close = nearest(str(name).rpartition(".")[2], known)
                raise UserError(f"{path} names the feature class {name!r}, which is not one of tfds.features{close}")


def _class_names(value: Any) -> Iterator[Any]:
    """The class names in either form of the file, that of a protocol buffer and the older one of `type` and `content`.

    A text named `json` is read by the class of its feature, which may have features of its own in it.
    """
    if isinstance(value, list):
        for item in value:
            yield from _class_names(item)
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        names = key in ("pythonClassName", "python_class_name") or (key == "type" and "content" in value)
        if names and not isinstance(inner, dict):  # else a field of that name
            yield inner
        if key == "json" and isinstance(inner, str):
            yield from _class_names(_nested(inner))
        yield from _class_names(inner)


def _nested(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _is_own(name: Any) -> bool:
    kind = getattr(tfds.features, str(name).rpartition(".")[2], None)
    own = isinstance(kind, type) and issubclass(kind, tfds.features.FeatureConnector)
    return own and name == f"{kind.__module__}.{kind.__name__}" and name.startswith(OWN)
