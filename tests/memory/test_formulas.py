"""The plan's bytes are those of real arrays and of the compiler, on one device and on a mesh."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.plan import literature
from lowrank.core import tree
from lowrank.memory import compiled, formulas, residuals, shapes
from lowrank.training import build, step
from tests.support.tiny_checkpoint import HEADS, HIDDEN, KV_HEADS, LAYERS, WIDTH, vocabulary
from tests.support.tiny_runs import config_of

NF4 = {"name": "nf4", "block": 8, "double": True}
RUNS = {
    "lora": ("rank=2", "llama", {}),
    "qdora": ("method=dora,rank=2", "llama", {"model__quantize": NF4}),
    "full": ("method=full", "llama", {"model__param_dtype": "bfloat16"}),
    "encoder": ("rank=2", "bert", {"objective": "classification", "data__template": "{text}"}),
}
MESHES = ({"data": 1}, {"data": 1, "fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 1})


def job_of(files, arg="rank=2", model="llama", mesh=MESHES[0], **changes):
    config = config_of(files, arg, model, **changes)
    config.mesh = mesh
    return build.build_run(config)


def on_first_device(arrays):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays))


@pytest.mark.parametrize(("name", "at"), [("lora", 1), ("qdora", 0), ("qdora", 1), ("full", 2), ("encoder", 0)])
def test_weights_adapter_and_moments_are_what_real_arrays_take_on_a_device(files, name, at):
    arg, model, changes = RUNS[name]
    run = job_of(files, arg, model, MESHES[at], **changes)
    params, _ = run.attach(run.load().params)
    trained, frozen = tree.split(params, run.mask)
    inputs = shapes.step_inputs(run)
    assert shapes.device_bytes(inputs.frozen) == on_first_device(frozen)
    assert shapes.device_bytes(inputs.state.trained) == on_first_device(trained)
    learned = sum(x.size for x in jax.tree.leaves(trained))
    counters = {x.shape: x.dtype for x in jax.tree.leaves(inputs.state.optimizer) if x.ndim == 0}
    whole = sum(x.size for x in jax.tree.leaves(inputs.state.optimizer) if x.ndim)
    assert counters
    assert whole == 2 * learned  # Adam's two


@pytest.mark.parametrize(("name", "at"), [("lora", 0), ("full", 1)])
def test_the_compiler_agrees_on_what_stays_and_nearly_on_what_does_not(files, name, at):
    arg, model, changes = RUNS[name]
    writes = {"eval__split": "train", "eval__texts": 5, "eval__max_new": 6} if name == "lora" else {}
    run = job_of(files, arg, model, MESHES[at], **{**changes, **writes, "model__param_dtype": "float32"})
    inputs = shapes.step_inputs(run)
    by_formula, by_compiler = formulas.estimate_memory(run, inputs), compiled.compile_programs(run, inputs)
    for part in ("weights", "adapter", "moments", "batch"):
        assert getattr(by_formula, part) == getattr(by_compiler, part), part
    known = by_formula.resident + by_formula.batch + 4  # and the number of steps done
    assert 0 <= known - by_compiler.step.arguments <= by_formula.batch  # what the loss does not read is left out
    assert 0.4 < by_formula.working / by_compiler.step.temporary < 2.5
    assert by_compiler.step.outputs < 4096  # metrics: the state is written over
    assert bool(by_compiler.generation) == bool(writes) == bool(by_formula.generation)
    if writes:
        sizes = run.scorer.text_sizes
        assert (sizes.rows, sizes.max_new) == (5, 16)
        assert by_formula.kv_cache == 2 * LAYERS * 5 * sizes.slots * KV_HEADS * (WIDTH // HEADS) * 4
        state = by_compiler.generation.arguments - by_compiler.weights - by_compiler.adapter
        assert by_formula.kv_cache <= state < 1.5 * by_formula.kv_cache
        assert by_compiler.generation.outputs < 4096  # the state is written over


def test_codes_take_as_arguments_what_the_formula_says(files):
    arg, model, changes = RUNS["qdora"]
    inputs = shapes.step_inputs(job_of(files, arg, model, MESHES[1], **changes))
    assert compiled.argument_bytes(inputs.frozen) == shapes.device_bytes(inputs.frozen)
    assert compiled.argument_bytes(inputs.state.trained) == shapes.device_bytes(inputs.state.trained)


def test_activations_follow_what_is_rematerialized(files):
    run = job_of(files, model__remat="none", data__seq_len=64)
    inputs = shapes.step_inputs(run)
    program = compiled.analyze_memory(
        lambda: step.compile_step(run.step(run.optimizer()), inputs.state, inputs.frozen, inputs.batch)
    )
    assert 0.4 < formulas.estimate_memory(run, inputs).working / program.temporary < 2.5
    kept_by = {
        r: residuals.activation_bytes(run, inputs, r) for r in ("none", "dots_all", "names", "dots", "full", "offload")
    }
    assert kept_by["none"] == residuals.activation_bytes(run, inputs)
    assert kept_by["none"] > kept_by["dots_all"] > kept_by["dots"] > kept_by["full"] > kept_by["offload"]
    assert kept_by["names"] > kept_by["full"]
    away = residuals.activation_bytes(run, inputs, "offload", host=True)
    assert away == LAYERS * 8 * 64 * WIDTH * 4  # each block's input
    assert kept_by["full"] - kept_by["offload"] == away


@pytest.mark.parametrize(
    ("adapted", "changes"),
    [(2, {"model__quantize": NF4}), (7, {"method__target": ".*kernel"}), (2, {"model__dtype": "bfloat16"})],
)
def test_dots_keeps_each_product_once_whatever_its_weight_is(files, adapted, changes):
    run = job_of(files, "rank=2", data__seq_len=64, **changes)
    inputs = shapes.step_inputs(run)
    wide = 2 * WIDTH + 2 * KV_HEADS * (WIDTH // HEADS) + 2 * HIDDEN  # q, o; k, v; gate, up: no gradient asks for down
    size = 2 if "model__dtype" in changes else 4
    products = LAYERS * 8 * 64 * (wide + adapted * 2) * size  # and `x @ A`, but not what is added to `x @ W`
    assert residuals.activation_bytes(run, inputs, "dots") - residuals.activation_bytes(run, inputs, "full") == products


@pytest.mark.parametrize(
    ("target", "inputs"),
    [
        (r".*attn/(q|v)/kernel", WIDTH),
        (r"layers/.*kernel", 3 * WIDTH + HIDDEN),
    ],  # q, k and v share one; gate and up another
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_fa_keeps_no_input_of_an_adapted_kernel(files, target, inputs, dtype):
    changes = {"method__target": target, "model__remat": "none", "data__seq_len": 64, "model__dtype": dtype}
    runs = [job_of(files, arg, **changes) for arg in ("rank=2", "method=lora_fa,rank=2")]
    kept, kept_fa = (residuals.activation_bytes(run, shapes.step_inputs(run)) for run in runs)
    assert kept - kept_fa == LAYERS * 8 * 64 * inputs * (4 if dtype == "float32" else 2)


def test_the_gradient_of_a_trained_head_in_chunks_lies_on_a_mesh_as_the_head_does(files):
    changes = {"data__seq_len": 16, "logits_chunk_tokens": 32}
    kept = {}
    for devices in (1, 4):  # whole activations of two rows on each of them
        mesh = {"data": 1, "fsdp": devices}
        for arg in ("method=full", "rank=2"):
            run = job_of(files, arg, mesh=mesh, **{**changes, "data__batch_size": 2 * devices})
            kept[devices, arg] = residuals.activation_bytes(run, shapes.step_inputs(run))
    gradients = [kept[devices, "method=full"] - kept[devices, "rank=2"] for devices in (1, 4)]
    head = 4 * WIDTH * len(vocabulary())
    assert gradients[0] - gradients[1] == head - head // 4


def test_what_moves_between_devices_is_no_wider_than_the_activations(files):
    arg, model, changes = RUNS["full"]
    wide, narrow = (
        job_of(files, arg, model, {"data": 1, "fsdp": 4}, **{**changes, "model__dtype": dtype})
        for dtype in ("float32", "bfloat16")
    )
    assert formulas.gathered_bytes(wide, shapes.step_inputs(wide)) == 2 * formulas.gathered_bytes(
        narrow, shapes.step_inputs(narrow)
    )


def test_a_rematerialized_block_keeps_its_input_alone():
    run = literature.plan("LLaMA-7B", {"name": "lora", "rank": 8})
    found = literature.arrays(run, rows=2, length=1024)
    inputs = 32 * 2 * 1024 * 4096 * 2  # layers, rows, tokens, width, bfloat16
    assert 1 < residuals.activation_bytes(run, found) / inputs < 1.25


def test_a_mesh_divides_a_kernel_by_its_axes_and_the_batch_by_data_and_fsdp(files):
    one, many = (shapes.step_inputs(job_of(files, mesh=mesh)) for mesh in MESHES[:2])
    kernel = lambda inputs: inputs.frozen["layers"]["mlp"]["up"]["kernel"]  # noqa: E731
    assert shapes.device_bytes(kernel(one)) == LAYERS * WIDTH * HIDDEN * 4
    assert shapes.device_bytes(kernel(many)) == LAYERS * WIDTH * HIDDEN * 4 // 8
    assert shapes.device_bytes(one.batch) == 4 * shapes.device_bytes(many.batch)


def test_the_mesh_divides_activations_and_gathers_a_block(files):
    alone, rows, tokens, cut = (
        formulas.estimate_memory(job_of(files, mesh=mesh))
        for mesh in (MESHES[0], {"data": 4}, {"data": 1, "context": 4}, {"data": 1, "fsdp": 4})
    )
    assert rows.activations == tokens.activations == cut.activations
    assert tokens.weights == cut.weights
    assert 3 < alone.activations / cut.activations < 4.01
    assert cut.temporary > rows.temporary
    assert cut.weights < rows.weights == alone.weights


@pytest.mark.parametrize("axis", ["fsdp", "context"])
def test_the_other_shards_of_a_block_and_of_the_head_are_gathered_over_fsdp_and_context_alike(files, axis):
    run = job_of(files, mesh={"data": 1, axis: 4}, method__target=".*attn/q/kernel")
    heads = WIDTH + 2 * KV_HEADS * (WIDTH // HEADS) + WIDTH  # q, k and v, o
    factors = 2 * 2  # both of q; their gradients are summed over the devices
    entries = WIDTH * (heads + 3 * HIDDEN + 2 * factors + len(vocabulary()))  # with the head
    assert formulas.gathered_bytes(run, shapes.step_inputs(run)) == 4 * entries * 3 // 4


def test_context_gathers_the_keys_and_values_of_a_row_and_their_gradients(files):
    run = job_of(files, mesh={"data": 2, "context": 4}, data__seq_len=64)
    inputs = shapes.step_inputs(run)
    assert formulas.gathered_keys_bytes(run, inputs) == 6 * 4 * (8 // 2) * 64 * 3 // 4 * KV_HEADS * (WIDTH // HEADS)
    assert formulas.gathered_keys_bytes(job_of(files, mesh={"data": 2}), inputs) == 0


def test_the_logits_of_a_chunk_are_those_that_the_loss_makes(files):
    """Of 8 rows of 64 tokens on two devices, 100 tokens a device are 25 positions a row."""
    run = job_of(files, mesh={"data": 2}, data__seq_len=64, logits_chunk_tokens=100)
    inputs = shapes.step_inputs(run)
    assert shapes.logits_chunks(run, inputs) == (3, 100)
    assert formulas.logits_bytes(run, inputs) == 4 * 100 * len(vocabulary())
    run = job_of(files, mesh={"data": 2}, data__seq_len=64, logits_chunk_tokens=3)  # less than a row's position each
    assert shapes.logits_chunks(run, inputs) == (64, 4)


@pytest.mark.parametrize(("platform", "tile"), [("cpu", 2**20), ("gpu", 2**23), ("tpu", 2**24)])
def test_a_decoded_tile_is_that_of_the_devices(platform, tile):
    run = literature.plan("LLaMA-7B", {"name": "lora", "rank": 8}, "nf4")
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    assert formulas.decoded_bytes(dataclasses.replace(run, mesh=mesh)) == 4 * tile


def test_microbatches_keep_less_and_add_a_sum_of_gradients(files):
    whole, parts = (formulas.estimate_memory(job_of(files, optim__accumulate=n)) for n in (1, 4))
    assert parts.gradients == 2 * whole.gradients == 2 * whole.adapter
    assert 3 < whole.activations / parts.activations < 4.01


def test_sgd_has_no_moments(files):
    assert formulas.estimate_memory(job_of(files, optim__name="sgd")).moments < 64


def test_what_is_on_the_host_is_counted_apart(files):
    run = job_of(files)
    inputs = shapes.step_inputs(run)
    moved = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind("pinned_host"))  # noqa: E731
    state = dataclasses.replace(inputs.state, optimizer=jax.tree.map(moved, inputs.state.optimizer))
    here, there = (
        formulas.estimate_memory(run, inputs),
        formulas.estimate_memory(run, dataclasses.replace(inputs, state=state)),
    )
    assert (there.moments, there.host) == (0, here.moments)
    assert there.step == here.step - here.moments


@pytest.mark.parametrize(
    "message",
    [
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 37.50G of 15.75G hbm. Exceeded "
        "hbm capacity by 21.75G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (37.50G) exceeds available HBM "
        "(15.75G).",
    ],
)
def test_a_program_without_room_is_reported_not_raised(message):
    def refuse():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    assert compiled.analyze_memory(refuse).total == int(37.5 * 2**30)


def test_another_fault_of_a_compiler_is_raised():
    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compiled.analyze_memory(fail)
