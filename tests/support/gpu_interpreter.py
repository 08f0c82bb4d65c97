"""Pallas's interpreter of GPU kernels, which is private to jax: bodies in Mosaic GPU run in it on a CPU.

It lacks two things that are added here: the cast of a register layout, which changes no value, and a second operand of
a product that is a transposed reference.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax.interpreters import mlir

KNOWN = ("0.10.2",)  # the versions of jax whose interpreter this file fits


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """A context in which kernels of Mosaic GPU run on the CPU; a test is skipped on versions of jax not known here."""
    if jax.__version__ not in KNOWN:
        pytest.skip(f"jax {jax.__version__} is not one whose GPU interpreter is known here: {', '.join(KNOWN)}")
    from jax._src.pallas.mosaic_gpu import core
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params

    mlir.register_lowering(core.layout_cast_p, lambda ctx, x, new_layout: [x], platform="cpu")
    product = functools.partial(_product, gpu_callbacks.wgmma)
    with mock.patch.object(gpu_callbacks, "wgmma", product), params.force_gpu_interpret_mode():
        yield


def _product(product: Any, *, b_transforms: tuple[Any, ...], **options: Any) -> Any:
    """The interpreter's product, in which a transposed second operand is read as it lies and transposed."""
    from jax._src.state.types import TransposeTransform

    kept = tuple(t for t in b_transforms if not isinstance(t, TransposeTransform))
    if len(kept) == len(b_transforms):
        return product(b_transforms=b_transforms, **options)
    matmul = np.matmul
    with mock.patch.object(np, "matmul", lambda a, b, dtype: matmul(a, b.T, dtype=dtype)):
        return product(b_transforms=kept, **options)
