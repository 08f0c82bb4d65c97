"""The leaves of a model, and the Hugging Face tensors that each is read from, family by family."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from lowrank.models.layer_stack import stack_depths


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One leaf and the tensors that it is read from.

    `hf` names one tensor. With `{i}` in it, the `count` tensors of layers `first, first + 1, ...` are stacked on axis 0
    of the leaf; with `{e}` too, each layer's `experts` on axis 1. `transpose`: torch stores a Linear's kernel
    `[out, in]`, and the leaf is `[in, out]`. `dtype` is the required stored dtype; "": any floating-point dtype.
    Layers in `absent` have no tensor: their part of the leaf is 1, and the model does not use it.
    """

    leaf: str
    hf: str
    transpose: bool = False
    first: int = 0
    count: int = 0
    experts: int = 0
    dtype: str = ""
    absent: tuple[int, ...] = ()

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of the leaf, along which the tensors are stacked."""
        return tuple(n for n in (self.count, self.experts) if n)

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """The index of each tensor in the leaf, in the order of `names`."""
        places = itertools.product(*map(range, self.stack))
        return tuple(place for place in places if not self.absent or self.first + place[0] not in self.absent)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order in which they are stacked."""
        if not self.count:
            return (self.hf,)
        return tuple(self.hf.format(i=self.first + i, e=e[0] if e else None) for i, *e in self.places)


TensorRow = tuple[str, str, bool]  # leaf, hf, transpose
GLU = ("gate", "up", "down")


def linear_rows(leaf: str, hf: str, bias: bool = False, transpose: bool = True) -> list[TensorRow]:
    """The rows of a Linear."""
    rows = [(f"{leaf}/kernel", f"{hf}.weight", transpose)]
    return [*rows, (f"{leaf}/bias", f"{hf}.bias", False)] if bias else rows


def norm_rows(leaf: str, hf: str, bias: bool = False) -> list[TensorRow]:
    """The rows of an RMSNorm, or of a LayerNorm with its bias."""
    rows = [(f"{leaf}/scale", f"{hf}.weight", False)]
    return [*rows, (f"{leaf}/bias", f"{hf}.bias", False)] if bias else rows


def stacked(config: Any, prefix: str, rows: Iterable[TensorRow]) -> Iterator[Tensor]:
    """The leaves of all layers, each stacked from the tensors `{prefix}.{layer}.{hf}`."""
    first = 0
    for stack, depth in stack_depths(config).items():
        for leaf, hf, transpose in rows:
            experts = config.experts if "{e}" in hf else 0
            yield Tensor(f"{stack}/{leaf}", f"{prefix}.{{i}}.{hf}", transpose, first, depth, experts)
        first += depth


def whole(rows: Iterable[TensorRow]) -> Iterator[Tensor]:
    """The leaves outside of layers."""
    for leaf, hf, transpose in rows:
        yield Tensor(leaf, hf, transpose)


def decoder_head(c: Any) -> list[TensorRow]:
    """The rows of a decoder's head, if it has one of its own."""
    if c.num_labels:
        return linear_rows("head", "score")
    return [] if c.tied else linear_rows("head", "lm_head")


def mixtral(c: Any) -> list[Tensor]:
    """Mixtral: Llama's names, and experts in a file layout that is older than that of transformers' modules."""
    rows = linear_rows("mlp/router", "block_sparse_moe.gate")
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    rows += [
        row
        for n, hf in names.items()
        for row in linear_rows(f"mlp/experts/{n}", f"block_sparse_moe.experts.{{e}}.{hf}")
    ]
    return _llama(c, rows)


def sparse(c: Any) -> list[Tensor]:
    """OLMoE and the Qwen MoE models: Llama's names, and one tensor for each expert."""
    rows = linear_rows("mlp/router", "mlp.gate")
    rows += [row for n in GLU for row in linear_rows(f"mlp/experts/{n}", f"mlp.experts.{{e}}.{n}_proj")]
    if c.shared_hidden:
        rows += [row for n in GLU for row in linear_rows(f"mlp/shared/{n}", f"mlp.shared_expert.{n}_proj")]
        rows += linear_rows("mlp/shared_gate", "mlp.shared_expert_gate")
    return _llama(c, rows)


def llama(c: Any) -> list[Tensor]:
    """Llama, and the families with the same names: Mistral, Qwen, Gemma, Phi-3."""
    kernels = ("gate_up", "down") if c.fused_gate_up else GLU
    return _llama(c, [row for n in kernels for row in linear_rows(f"mlp/{n}", f"mlp.{n}_proj", c.mlp_bias)])


def _llama(c: Any, mlp: list[TensorRow]) -> list[Tensor]:
    kernels = ("qkv",) if c.fused_qkv else ("q", "k", "v")
    rows = [row for n in kernels for row in linear_rows(f"attn/{n}", f"self_attn.{n}_proj", c.qkv_bias)]
    rows += linear_rows("attn/o", "self_attn.o_proj", c.o_bias)
    if c.qk_norm or c.wide_qk_norm:
        rows += norm_rows("attn/q_norm", "self_attn.q_norm") + norm_rows("attn/k_norm", "self_attn.k_norm")
    rows += mlp
    if c.pre_norms:
        before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        rows += norm_rows("attn_norm", "input_layernorm") + norm_rows("mlp_norm", before_mlp)
    if c.post_norms:
        rows += norm_rows("post_attn_norm", "post_attention_layernorm")
        rows += norm_rows("post_mlp_norm", "post_feedforward_layernorm")
    ends = [
        ("embed/embedding", "model.embed_tokens.weight", False),
        *norm_rows("norm", "model.norm"),
        *decoder_head(c),
    ]
    return [*whole(ends), *stacked(c, "model.layers", rows)]


def gpt2(c: Any) -> list[Tensor]:
    """GPT-2, whose Conv1D stores kernels `[in, out]`, as the leaves are."""
    rows = linear_rows("attn/qkv", "attn.c_attn", True, False) + linear_rows("attn/o", "attn.c_proj", True, False)
    rows += linear_rows("mlp/up", "mlp.c_fc", True, False) + linear_rows("mlp/down", "mlp.c_proj", True, False)
    rows += norm_rows("attn_norm", "ln_1", True) + norm_rows("mlp_norm", "ln_2", True)
    ends = [("embed/embedding", "transformer.wte.weight", False), ("embed/positions", "transformer.wpe.weight", False)]
    ends += norm_rows("norm", "transformer.ln_f", True) + decoder_head(c)
    return [*whole(ends), *stacked(c, "transformer.h", rows)]


def _encoder(c: Any, prefix: str, head: list[TensorRow]) -> list[Tensor]:
    names = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
    rows = [row for n, hf in names.items() for row in linear_rows(f"attn/{n}", f"attention.{hf}", True)]
    rows += norm_rows("attn_norm", "attention.output.LayerNorm", True)
    rows += linear_rows("mlp/up", "intermediate.dense", True) + linear_rows("mlp/down", "output.dense", True)
    rows += norm_rows("mlp_norm", "output.LayerNorm", True)
    tables = {"embedding": "word_embeddings", "positions": "position_embeddings", "types": "token_type_embeddings"}
    ends = [(f"embed/{leaf}", f"{prefix}.embeddings.{hf}.weight", False) for leaf, hf in tables.items()]
    ends += norm_rows("embed/norm", f"{prefix}.embeddings.LayerNorm", True)
    if c.pooling == "pooler":
        ends += linear_rows("pooler", f"{prefix}.pooler.dense", True)
    return [*whole(ends + (head if c.num_labels else [])), *stacked(c, f"{prefix}.encoder.layer", rows)]


def bert(c: Any) -> list[Tensor]:
    """BERT, and the sentence encoders derived from it."""
    return _encoder(c, "bert", linear_rows("head", "classifier", True))


def roberta(c: Any) -> list[Tensor]:
    """RoBERTa, whose classification head has two layers."""
    head = linear_rows("head/dense", "classifier.dense", True) + linear_rows("head/out", "classifier.out_proj", True)
    return _encoder(c, "roberta", head)
