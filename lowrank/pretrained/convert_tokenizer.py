"""Tokenizers without a `tokenizer.json`: SentencePiece's `tokenizer.model`, BERT's `vocab.txt`, GPT-2's two files.

Each is converted by transformers' own code, where that is installed: how a vocabulary is used depends on its model.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import tokenizers

from lowrank.core.errors import UserError

# The files that hold a vocabulary -> the packages that convert them.
VOCABULARIES = {
    ("tokenizer.model",): ("transformers", "sentencepiece", "google.protobuf"),
    ("vocab.txt",): ("transformers",),
    ("vocab.json", "merges.txt"): ("transformers",),
}
PROBE = "a b"
SPECIAL = tuple(f"{name}_token" for name in ("bos", "cls", "eos", "sep", "pad", "unk"))


def find_vocabulary(directory: Path) -> tuple[str, ...]:
    """The files of the vocabulary in a folder; empty where there are none."""
    return next((names for names in VOCABULARIES if all((directory / name).exists() for name in names)), ())


def convert(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """`(backend, special tokens and chat template)` of a folder's vocabulary.

    Raises UserError without one, without the packages, and where transformers cannot convert it.
    """
    names = find_vocabulary(directory)
    if not names:
        raise UserError(f"{directory} has no tokenizer.json, which every model needs")
    missing = [package for package in VOCABULARIES[names] if not _installed(package)]
    if missing:
        found, install = " and ".join(names), " ".join(missing).replace("google.", "")
        raise UserError(
            f"{directory} has no tokenizer.json, only {found}, which transformers converts: pip install {install}"
        )
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        backend = tokenizers.Tokenizer.from_str(made.backend_tokenizer.to_str())
    except Exception as e:  # a file that is broken fails anywhere in the conversion
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(f"{directory}: transformers cannot convert {' and '.join(names)}: {reason}") from None
    finally:
        transformers.logging.set_verbosity(level)
    if "tokenizer.model" in names:
        _check_pieces(directory, backend)
    config = {key: str(token) for key in SPECIAL if (token := getattr(made, key, None)) is not None}
    return backend, config | ({"chat_template": made.chat_template} if made.chat_template else {})


def _check_pieces(directory: Path, backend: tokenizers.Tokenizer) -> None:
    """Raises UserError where the conversion cuts a text otherwise than SentencePiece does.

    Without the name of its class, transformers leaves out the space that some models put before a text.
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    expected = [model.id_to_piece(i) for i in model.encode(PROBE)]
    found = backend.encode(PROBE, add_special_tokens=False).tokens
    if found != expected:
        raise UserError(
            f"{directory}: transformers cuts {PROBE!r} into {found}, and the tokenizer.model itself into {expected}: "
            "name its class in tokenizer_config.json, such as 'tokenizer_class': 'LlamaTokenizer'"
        )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
