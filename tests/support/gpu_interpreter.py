"""Pallas's interpreter of GPU kernels, which is private to jax: bodies in Mosaic GPU run in it on a CPU.

It lacks two things that are added here: the cast of a register layout, which changes no value, and operands of a
product that are transposed references.
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


def _product(product: Any, *, a_transforms: Any, b_transforms: Any, **options: Any) -> Any:
    """The interpreter's product, in which a transposed operand is read as it lies and transposed."""
    from jax._src.state.types import TransposeTransform

    both = (a_transforms, b_transforms)
    kept = [tuple(t for t in of if not isinstance(t, TransposeTransform)) for of in both]
    turned = [len(k) < len(of) for k, of in zip(kept, both, strict=True)]
    matmul = np.matmul

    def multiply(*operands: np.ndarray, dtype: Any) -> np.ndarray:
        a, b = (x.T if turn else x for x, turn in zip(operands, turned, strict=True))
        return matmul(a, b, dtype=dtype)

    with mock.patch.object(np, "matmul", multiply):
        return product(a_transforms=kept[0], b_transforms=kept[1], **options)
