"""A checkpoint whose kernels become codes as they are read: the right codes, the right shards."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowrank import pretrained
from lowrank.core import sharding, tree
from lowrank.core.errors import UserError
from lowrank.core.weight import is_stored, is_weight, materialize
from lowrank.pretrained.tensor_reader import check_finite
from lowrank.weights.quantized.schemes import SCHEMES
from tests.support import checkpoint_files as files
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close

values = jax.jit(materialize)
NF4 = {"name": "nf4", "block": 8, "double": True}
OPTIONS = {"mixed": {"block": 8, "budget": 4.0}}  # tiny kernels have large scales


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("hf") / "tiny-llama")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_those_of_the_kernel_and_the_rest_is_as_it_was(scheme, folder):
    group = {"name": scheme, **OPTIONS.get(scheme, {})}
    plain = pretrained.load(str(folder)).params
    read = pretrained.load(str(folder), quantized=group).params
    shapes = pretrained.describe(str(folder), quantized=group)[2]
    assert jax.tree.structure(shapes) == jax.tree.structure(read)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, read))
    codes, before = dict(tree.named_leaves(read, is_weight)), dict(tree.named_leaves(plain))
    made = jax.jit(SCHEMES[scheme](**OPTIONS.get(scheme, {})))
    for name, kernel in before.items():
        if not name.startswith("layers/") or not name.endswith("kernel"):
            np.testing.assert_array_equal(codes[name], kernel)
        else:
            assert is_stored(codes[name])
    if scheme == "mixed":  # whose kernels share a budget
        return
    name = "layers/mlp/down/kernel"
    assert_close(values(codes[name]), values(made(before[name])))


def test_every_device_has_its_own_shard_of_the_codes(folder):
    whole = pretrained.load(str(folder), quantized=NF4).params
    mesh = sharding.make_mesh(2, 2, 2)
    shared = pretrained.load(str(folder), quantized=NF4, mesh=mesh).params
    jax.tree.map(np.testing.assert_array_equal, whole, shared)
    up = shared["layers"]["mlp"]["up"]["kernel"]
    assert up.codes.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert not any(up.scale.second.sharding.spec)


def test_the_dtype_of_the_values_is_that_of_the_parameters(folder):
    read = pretrained.load(str(folder), quantized=NF4, param_dtype="bfloat16").params
    kernel = read["layers"]["attn"]["q"]["kernel"]
    assert (kernel.dtype, values(kernel).dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_a_target_says_which_kernels(folder):
    read = pretrained.load(str(folder), quantized={"name": "int8", "target": ".*mlp/.*kernel|head/kernel"}).params
    stored = [name for name, w in tree.named_leaves(read, is_weight) if is_stored(w)]
    assert stored == ["head/kernel", *(f"layers/mlp/{n}/kernel" for n in ("down", "gate", "up"))]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"name": "nf5"}, r"unknown model.quantize.name 'nf5' \(did you mean 'nf4'\?\)"),
        ({"name": "nf4", "blok": 64}, r"'model.quantize.blok' \(did you mean 'model.quantize.block'\?\)"),
        ({"name": "nf4", "block": 7}, "block must be a multiple of 4"),
        ({"name": "nf4", "target": ".*/q/kernl"}, "model.quantize target '.*/q/kernl' matches no leaf"),
        ({"name": "nf4", "target": ".*bias"}, "only kernels"),
        ({"name": "integer", "bits": 5}, "bits must be one of 2, 4, 8, not 5"),
    ],
)
def test_bad_groups_are_refused_without_reading_a_tensor(group, message, folder):
    with pytest.raises(UserError, match=message):
        pretrained.describe(str(folder), quantized=group)


@pytest.mark.parametrize(("group", "dtype"), [(NF4, "float32"), (None, "float32"), (None, "float16")])
def test_a_tensor_that_is_not_finite_is_named(group, dtype, tmp_path):
    broken = tiny.llama(tmp_path / "broken")
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(broken / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.inf
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN or infinite"):
        pretrained.load(str(broken), quantized=group)


def test_large_values_are_finite():
    values = np.array([[3e38, -0.0], [1e-40, 1]]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(check_finite("w", values[:, ::-1]), values[:, ::-1])
    with pytest.raises(UserError, match="tensor 'w' holds NaN"):
        check_finite("w", np.append(values, np.array(np.nan, jnp.bfloat16)))


def test_a_checkpoint_that_was_quantized_elsewhere_is_refused(tmp_path):
    folder = tiny.llama(tmp_path / "done")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantized by gptq"):
        pretrained.describe(str(folder))


WIDE = {**files.LLAMA, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def in_blocks(path, kinds):
    """A GGUF file whose matrices are in the blocks that `kinds` names by the end of a tensor's name."""
    arrays = files.converted(files.tensors(WIDE), "llama")
    named = {n: k for n in arrays for end, k in kinds.items() if n.endswith(f"{end}.weight") and arrays[n].ndim == 2}
    metadata = {**files.gguf_metadata(WIDE, "llama"), **files.vocabulary()}
    return str(files.write_gguf(path, metadata, arrays, named))


def test_a_gguf_base_stays_in_its_own_blocks(tmp_path):
    ends = dict(
        zip(("_q", "_k", "_v", "attn_output", "gate", "up", "down"), ("Q4_0", "Q4_1", "Q8_0") * 3, strict=False)
    )
    path = in_blocks(tmp_path / "mixed.gguf", ends)
    read = pretrained.load(path, quantized="gguf").params
    shapes = pretrained.describe(path, quantized="gguf")[2]
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, read)
    plain, own = (dict(tree.named_leaves(p, is_weight)) for p in (pretrained.load(path).params, read))
    assert own["layers/attn/q/kernel"].title == "Q4_0"
    assert own["layers/mlp/up/kernel"].title == "Q8_0"
    for name, kernel in plain.items():
        assert is_stored(own[name]) == (name.startswith("layers/") and name.endswith("kernel"))
        assert_close(values(own[name]), kernel)


def test_what_is_in_other_blocks_is_named(tmp_path, folder):
    path = in_blocks(tmp_path / "part.gguf", {"_q": "Q4_0"})
    with pytest.raises(UserError, match=r"layers/attn/k/kernel is stored in F32, and model.quantize=gguf keeps Q4_0"):
        pretrained.describe(path, quantized="gguf")
    own = pretrained.describe(path, quantized={"name": "gguf", "target": ".*attn/q/kernel"})[2]
    assert is_stored(own["layers"]["attn"]["q"]["kernel"])
    path = in_blocks(tmp_path / "layers.gguf", {"blk.0.attn_q": "Q4_0", "blk.1.attn_q": "Q8_0", "blk.2.attn_q": "Q8_0"})
    with pytest.raises(UserError, match="layers/attn/q/kernel has layers in Q4_0 and Q8_0"):
        pretrained.describe(path, quantized={"name": "gguf", "target": ".*attn/q/kernel"})
    with pytest.raises(UserError, match=r"is stored in F32, and model\.quantize=gguf keeps"):
        pretrained.describe(str(folder), quantized="gguf")
