"""Checkpoints in and out: safetensors, GGUF, the hub, wheels, tokenizers, and quantization while loading."""

from lowrank.pretrained.export import export
from lowrank.pretrained.load import Pretrained, describe, load
from lowrank.pretrained.resolve import resolve_checkpoint
from lowrank.pretrained.tokenizer import Tokenizer

__all__ = ["Pretrained", "Tokenizer", "describe", "export", "load", "resolve_checkpoint"]
