from lowrank.pretrained.export import export
from lowrank.pretrained.load import Pretrained, describe, find, load
from lowrank.pretrained.tokenizer import Tokenizer

__all__ = ["Pretrained", "Tokenizer", "describe", "export", "find", "load"]
