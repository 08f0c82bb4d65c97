"""The step on a real decoder: what it keeps in memory, and the same gradient on every mesh."""

import jax
import numpy as np

from lowrank import methods
from lowrank.core import tree
from tests.support.close import assert_close
from tests.support.decoder_steps import B, T, compile_on_decoder, count_bytes


def test_a_lora_step_of_a_decoder_holds_neither_frozen_gradients_nor_all_logits():
    vocab, rows = 4096, 32
    method = methods.lora(rank=4)
    compiled, state, frozen, _ = compile_on_decoder(method, (1, 1, 1), rows, width=128, layers=8, vocab=vocab)
    memory = compiled.memory_analysis()
    logits, kernels = B * T * vocab * 4, count_bytes(frozen["layers"])
    assert memory.temp_size_in_bytes < logits
    assert memory.temp_size_in_bytes < kernels
    assert memory.alias_size_in_bytes == count_bytes(state)
    assert memory.output_size_in_bytes < count_bytes(state) + 1024
    all_at_once, *_ = compile_on_decoder(method, (1, 1, 1), 0, width=128, layers=8, vocab=vocab)
    assert all_at_once.memory_analysis().temp_size_in_bytes > logits


# Wrong collectives are a real danger: XLA's partitioner (jaxlib 0.10.2) gives wrong gradients on a 2 x 2 x 2 mesh when
# two kernels in a row are both split (fsdp, tensor); the rules split the second one the other way round.
def test_a_decoder_has_the_same_gradient_on_every_mesh():
    method = methods.lora(rank=4, target=r".*/(q|k|v|o|gate|up|down)/kernel")
    want = None
    for sizes in ((1, 1, 1), (2, 2, 2), (1, 2, 2, 2), (1, 1, 1, 8)):
        compiled, state, frozen, batch = compile_on_decoder(method, sizes, 64)
        before = jax.device_get(state.trained)
        state, metrics = compiled(state, frozen, batch, np.float32(1))
        gradient = jax.tree.map(lambda a, b: a - b, before, jax.device_get(state.trained))
        want = want or (float(metrics["loss"]), gradient)
        assert_close(metrics["loss"], want[0])
        for (name, got), (_, expected) in zip(tree.named_leaves(gradient), tree.named_leaves(want[1]), strict=True):
            assert_close(got, expected, relative=1e-4, name=f"{name} on {sizes}")
