from lowrank.pretrained.export import export
from lowrank.pretrained.find import find
from lowrank.pretrained.load import Pretrained, describe, load
from lowrank.pretrained.tokenizer import Tokenizer

__all__ = ["Pretrained", "Tokenizer", "describe", "export", "find", "load"]
