"""The benchmark of a GPU, up to the device: its kernels agree with float64, and it needs no package of the data's."""

import subprocess
import sys

import jax
import pytest

from experiments.bench import gpu, gpu_kernels, gpu_problems, gpu_sizes
from lowrank import pretrained
from tests.support import thinning


@pytest.mark.parametrize("name", thinning.keep(gpu_problems.CHECKS, ("lora rank 1", "adapters")))
def test_every_form_agrees_with_float64(name):
    problem = gpu_problems.CHECKS[name]
    inputs = problem.inputs(jax.random.key(0))
    found = gpu_kernels.differences(problem, (*inputs, gpu_problems.cotangent(problem, inputs, jax.random.key(1))))
    assert set(found["relative"]) == set(problem.forms) - {gpu_problems.BODY}
    assert found["agrees"]


def test_a_pallas_body_that_fails_or_disagrees_is_left_out_of_what_is_timed(monkeypatch):
    problem = gpu_problems.CHECKS["lora rank 1"]
    ours = problem.forms[gpu_problems.OURS]
    inputs = problem.inputs(jax.random.key(0))
    given = (*inputs, gpu_problems.cotangent(problem, inputs, jax.random.key(1)))
    monkeypatch.setattr(gpu_kernels.dispatch, "runs_on", lambda name, kind: True)
    monkeypatch.setattr(gpu_kernels, "seconds", lambda call, given: {"median": 1.0})

    def refused(*arrays):
        raise ValueError("no layout\nat line 3")

    for body, why in ((refused, "no layout"), (lambda *arrays: 2 * ours(*arrays), "it differs from ours by 1.0e+00")):
        changed = problem._replace(forms={gpu_problems.OURS: ours, gpu_problems.BODY: body})
        assert gpu_kernels.differences(changed, given)["agrees"]
        assert gpu_kernels.times(changed, given)[gpu_problems.BODY] == {"failed": why}


def test_our_side_imports_no_package_that_the_machine_may_lack():
    lacking = ("grain", "tensorflow_datasets", "array_record", "orbax", "ml_collections", "sacrebleu")
    program = f"import sys, experiments.bench.gpu_ours; print([n for n in {lacking} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "[]"


def test_lines_of_results_are_merged_key_by_key():
    results = {"steps": {"a": {"ours": 1}}, "device": "x"}
    gpu.merge(results, {"steps": {"a": {"peft": 2}, "b": {"ours": 3}}})
    assert results == {"steps": {"a": {"ours": 1, "peft": 2}, "b": {"ours": 3}}, "device": "x"}


def test_the_share_of_the_peak_counts_four_operations_an_entry():
    config = pretrained.describe(str(gpu_sizes.BASES / "llama-3.1-8b"), planned=True)[0]
    entries = gpu_sizes.model_flops(config, 1) / 4
    assert entries == 8_030_261_248 - 128256 * 4096 - (2 * 32 + 1) * 4096  # all but the embedding and the norms
