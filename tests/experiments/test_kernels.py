"""The table of kernels: each form computes what its reference says, and `auto` takes what the results speak for."""

import json

import jax
import numpy as np
import pytest

from experiments.bench import tpu_kernels
from experiments.bench.kernels import KERNELS
from lowrank.kernels import dispatch
from lowrank.kernels.four_bit_matmul import tpu
from lowrank.kernels.grouped_lora.dispatch import SHOWN_RANK, SHOWN_RANKS
from tests.support.close import assert_close

CHIPS = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e"}
SMALL = {
    "rows": 6,
    "adapters": 3,
    "rank": 4,
    "inputs": 64,
    "outputs": 24,
    "batch": 2,
    "time": 3,
    "width": 8,
    "vocabulary": 11,
    "n": 256,
    "layers": 2,
}


@pytest.mark.parametrize("name", KERNELS)
def test_each_form_computes_what_the_reference_says(name):
    kernel = KERNELS[name]
    square = {"outputs": SMALL["inputs"]} if "layers" in kernel.sizes[0] else {}
    arguments = kernel.arguments(jax.random.key(0), **({axis: SMALL[axis] for axis in kernel.sizes[0]} | square))
    expected = kernel.reference(*arguments)
    for form, compute in kernel.forms.items():
        if form not in dispatch.IMPLEMENTATIONS or form == "xla":
            computed = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(compute)(*arguments))
            assert_close(computed, expected, relative=0.02, name=form)


def shown_sizes(operation):
    """`(kernel, size)` where `auto` takes the Pallas body."""
    if operation == "four_bit_matmul":
        names = ("nf4_decoding", "int4_decoding")
        return [(name, size) for name in names for size in KERNELS[name].sizes if size["rows"] % tpu.SUBLANES == 0]
    many = lambda size: size["adapters"] * size["rank"] >= SHOWN_RANKS and size["rank"] <= SHOWN_RANK  # noqa: E731
    return [(operation, size) for size in KERNELS[operation].sizes if many(size)]


@pytest.mark.parametrize(("kind", "operation"), [(kind, name) for kind, of in dispatch.SHOWN.items() for name in of])
def test_auto_takes_a_body_only_where_it_moves_fewer_bytes(kind, operation):
    results, sizes = json.loads(tpu_kernels.OUT.read_text()), shown_sizes(operation)
    assert sizes
    for name, size in sizes:
        found = results[tpu_kernels.key_of(CHIPS[kind], name, size)]
        assert found["pallas_tpu"]["moved"] < found["xla"]["moved"]
        assert found["pallas_tpu"]["temporary"] <= found["xla"]["temporary"]


@pytest.mark.parametrize("chip", CHIPS.values())
def test_one_product_moves_the_fewest_bytes_of_the_lora_forms_in_a_scan(chip):
    """Alone, the Pallas body may move fewer, but layers are scanned: their kernels are copied for it one by one."""
    results = json.loads(tpu_kernels.OUT.read_text())
    for name in ("lora_product", "lora_gradient", "lora_layers"):
        for size in KERNELS[name].sizes:
            found = results[tpu_kernels.key_of(chip, name, size)]
            assert found["xla"]["moved"] <= found["separate"]["moved"]
            if name == "lora_layers":
                assert found["xla"]["moved"] < found["pallas_tpu"]["moved"]
                assert found["xla"]["temporary"] < found["pallas_tpu"]["temporary"]
