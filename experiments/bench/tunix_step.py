"""The side of google-tunix in the benchmark of a step: answers each line on stdin with one training step.

It runs in an environment of its own, with google-tunix and what that installs. The shapes are those of the other sides,
and the weights are random: Tunix reads no GGUF file, and the time does not depend on them. The step is the one that its
`PeftTrainer` compiles.
"""

import json
import sys

import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer

from experiments.bench.worker import serve

SMOLLM2_135M = llama3.ModelConfig(
    num_layers=30,
    vocab_size=49152,
    embed_dim=576,
    hidden_dim=1536,
    num_heads=9,
    head_dim=64,
    num_kv_heads=3,
    rope_theta=100_000,
    norm_eps=1e-5,
    weight_tying=True,
)


def main(rows: int, length: int) -> None:
    """Makes the model with LoRA of rank 8 on q and v, then serves steps."""
    model = llama3.Llama3(SMOLLM2_135M, rngs=nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=".*(q_proj|v_proj)", rank=8, alpha=16.0)
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1_000_000)
    step, _ = peft_trainer.PeftTrainer(model, optax.adamw(1e-4, weight_decay=0.0), config).jit_train_and_eval_step()
    tokens = np.random.default_rng(0).integers(0, SMOLLM2_135M.vocab_size, (rows, length))
    batch = {
        "input_tokens": jnp.asarray(tokens, jnp.int32),
        "input_mask": jnp.ones((rows, length), bool),
        "positions": jnp.broadcast_to(jnp.arange(length), (rows, length)),
        "attention_mask": jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length)),
    }
    serve(lambda: float(step(batch)[0]))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
