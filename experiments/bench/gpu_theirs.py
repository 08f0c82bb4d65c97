"""A training step of peft with `torch.compile` on the shapes of a Llama (a part of `experiments.bench.gpu`).

bfloat16, attention by SDPA, random weights, the layers compiled one by one; a base in NF4 is that of bitsandbytes.
"""

import json
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.bench.gpu_sizes import TARGETS, VARIANTS, batch_rows, model_flops, report_line, size_of
from lowrank import pretrained

MODULES = [f"{name}_proj" for name in TARGETS]


def main(base: str, method: str, toy: bool) -> None:
    """Prints a JSON line with the step's time, its memory and its losses."""
    size, variant, cuda = size_of(base, toy), VARIANTS[method], torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    config = pretrained.describe(size.folder, size.overrides, planned=True)[0]
    torch.manual_seed(0)
    model = llama(config, device)
    if variant.quantize:
        quantize(model.model.layers, variant.quantize)
    adapter = LoraConfig(
        r=size.rank, lora_alpha=2 * size.rank, target_modules=MODULES, task_type="CAUSAL_LM", **variant.peft
    )
    model = get_peft_model(model, adapter, autocast_adapter_dtype=False).train()
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="aot_eager" if toy else "inductor")
    rows = batch_rows(size, torch.cuda.get_device_properties(0).total_memory if cuda else 0)
    tokens = torch.randint(config.vocab_size, (rows, size.length), device=device)
    seconds, losses = timed(model, tokens, size.steps)
    memory = torch.cuda.max_memory_allocated() if cuda else None
    kind = torch.cuda.get_device_name() if cuda else "cpu"
    flops = model_flops(config, rows * size.length)
    line = report_line(f"{base} {method}", "peft", seconds, rows * size.length, flops, memory, losses, kind)
    print(line, flush=True)


def llama(config: Any, device: torch.device) -> torch.nn.Module:
    """The model with random weights, in bfloat16 on the device."""
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tied,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        return LlamaForCausalLM(shape)


def quantize(layers: torch.nn.Module, scheme: str) -> None:
    """Replaces the linear maps of the layers by those of bitsandbytes, in codes of a scheme such as NF4."""
    import bitsandbytes as bnb

    for parent in list(layers.modules()):
        for name, old in list(parent.named_children()):
            if isinstance(old, torch.nn.Linear):
                new = bnb.nn.Linear4bit(
                    old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type=scheme
                )
                new.weight = bnb.nn.Params4bit(old.weight.data.cpu(), requires_grad=False, quant_type=scheme)
                setattr(parent, name, new.to(old.weight.device))


def timed(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> tuple[list[float], list[float]]:
    """`(seconds of each step, its loss)`, without the first two."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    seconds, losses = [], []
    for _ in range(steps + 2):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits for the device
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:], losses


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
