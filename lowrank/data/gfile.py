"""The part of TensorFlow that TFDS needs to unpack and read text: plain files in place of `tf.io.gfile`.

TFDS writes and reads array_record without TensorFlow, but it opens archives and the files of most text datasets through
`tf.io.gfile`, and names types such as `tf.int64`.
"""

import glob
import importlib.util
import os
import shutil
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
from tensorflow_datasets.core.utils import lazy_imports_utils


class _Part(SimpleNamespace):
    """A module of the stand-in. A missing attribute is an error that names TensorFlow's."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this dataset needs TensorFlow, for {self.path}.{name}")


def stand_in() -> None:
    """Makes TFDS use plain files for the rest of the process, unless TensorFlow is installed."""
    if importlib.util.find_spec("tensorflow") is None:
        vars(lazy_imports_utils.tensorflow).setdefault("_module", _tensorflow())


def _tensorflow() -> _Part:
    numbers = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)] + ["float32", "float64"]
    types = {name: np.dtype(name).type for name in numbers} | {"bool": np.bool_, "string": np.str_}
    errors = _Part(
        path="tf.errors",
        NotFoundError=FileNotFoundError,
        PermissionDeniedError=PermissionError,
        AlreadyExistsError=FileExistsError,
        UnimplementedError=NotImplementedError,
    )
    compat = _Part(path="tf.compat", as_text=_text, as_str=_text, as_str_any=_text, as_bytes=_bytes)
    io = _Part(path="tf.io", gfile=_files())
    return _Part(path="tf", io=io, errors=errors, compat=compat, **types)


def _files() -> _Part:
    return _Part(
        path="tf.io.gfile",
        GFile=_open,
        exists=os.path.exists,
        isdir=os.path.isdir,
        listdir=os.listdir,
        glob=lambda pattern: sorted(glob.glob(os.fspath(pattern))),
        walk=os.walk,
        makedirs=lambda path: os.makedirs(path, exist_ok=True),
        copy=lambda source, target, overwrite=False: shutil.copyfile(source, target),
        rename=lambda source, target, overwrite=False: os.replace(source, target),
        remove=os.remove,
        rmtree=shutil.rmtree,
    )


def _open(name: str | os.PathLike[str], mode: str = "r") -> IO[Any]:
    return open(name, mode) if "b" in mode else open(name, mode, encoding="utf-8", newline="")


def _text(value: str | bytes, encoding: str = "utf-8") -> str:
    return value.decode(encoding) if isinstance(value, bytes) else value


def _bytes(value: str | bytes, encoding: str = "utf-8") -> bytes:
    return value.encode(encoding) if isinstance(value, str) else value
