"""Checkpoints whose experts are fused, as transformers 5 has them in memory: the same leaves, or a clear refusal."""

import re

import jax
import numpy as np
import pytest

from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.pretrained import load
from tests.support.checkpoint_files import LLAMA, tensors, write_directory

MIXTURES = {
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 3},
    "olmoe": {**LLAMA, "model_type": "olmoe", "num_experts": 3, "num_experts_per_tok": 2},
}
OURS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def fused(arrays):
    """The tensors of a checkpoint with each layer's experts in two."""
    out, experts = {}, {}
    for name, x in arrays.items():
        name = name.replace("block_sparse_moe", "mlp")
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if found:
            experts.setdefault(found[1], {}).setdefault(OURS.get(found[3], found[3]), []).append(x)
        else:
            out[name] = x
    for path, parts in experts.items():
        out[f"{path}.gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
        out[f"{path}.down_proj"] = np.stack(parts["down_proj"])
    return out


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_are_those_that_stand_alone(name, tmp_path):
    config, arrays = MIXTURES[name], tensors(MIXTURES[name])
    alone = load(str(write_directory(tmp_path / "alone", config, arrays))).params
    folder = str(write_directory(tmp_path / "fused", config, fused(arrays), dtype="F32", shards=2))
    jax.tree.map(np.testing.assert_array_equal, load(folder).params, alone)
    jax.tree.map(np.testing.assert_array_equal, load(folder, mesh=sharding.make_mesh(2, 2, 2)).params, alone)


@pytest.mark.parametrize(
    ("experts", "message"),
    [(2, "experts.2.down_proj.weight' is missing"), (4, "experts.3.down_proj.weight' has no place in this model")],
)
def test_another_number_of_experts_is_refused(experts, message, tmp_path):
    arrays = fused(tensors(MIXTURES["olmoe"]))
    down = arrays["model.layers.1.mlp.experts.down_proj"]
    arrays["model.layers.1.mlp.experts.down_proj"] = np.concatenate([down, down])[:experts]
    folder = write_directory(tmp_path / "m", MIXTURES["olmoe"], arrays)
    with pytest.raises(UserError, match=message):
        load(str(folder))
