"""The tokenizer of a model: text to token ids and back, with its special tokens and its chat template."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lowrank.core import schema
from lowrank.core.errors import UserError
from lowrank.core.json_types import GenerationConfig, TokenizerConfig
from lowrank.core.paths import is_missing, require_file
from lowrank.pretrained import bounded_backend, chat_template, convert_tokenizer
from lowrank.pretrained.bounded_backend import bounded, without_panic
from lowrank.pretrained.chat_template import Messages, Rendered

LARGEST = 2**28  # bytes of a `tokenizer.json`; Gemma 3's has 33 million


class Tokenizer:
    """A tokenizer of the `tokenizers` library and its `tokenizer_config.json`.

    `bos_id` may be None; `eos_id` is the end of a text (for BERT its separator); `pad_id` is never None; `stop_ids`
    are the tokens at which generation ends.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], stop_ids: Sequence[int] = ()):
        """`config` has the fields of `tokenizer_config.json`. Raises UserError when no token ends a text."""
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.config = backend, dict(config)
        self.bos_id = self._special("bos_token", "cls_token")
        eos_id = self._special("eos_token", "sep_token")
        if eos_id is None:
            raise UserError("the tokenizer has neither an 'eos_token' nor a 'sep_token' in its vocabulary")
        self.eos_id = eos_id
        pad_id = self._special("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self.stop_ids = tuple(sorted({self.eos_id, *(i for i in stop_ids if 0 <= i < self.vocab_size)}))

    def with_rows(self, rows: int) -> "Tokenizer":
        """The tokenizer of a model with `rows` token embeddings: a text with a token beyond them raises UserError."""
        backend = bounded(self.backend, rows)
        return self if backend is self.backend else Tokenizer(backend, self.config, self.stop_ids)

    def _special(self, *keys: str) -> int | None:
        ids = (self.backend.token_to_id(self._text(key)) for key in keys if self._text(key))
        return next((i for i in ids if i is not None), None)

    def _text(self, key: str) -> str:
        token = self.config.get(key) or ""
        return token["content"] if isinstance(token, Mapping) else token

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens around it; special tokens that it spells out are recognized."""
        return bounded_backend.encode(self.backend, text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` returns them, computed on all cores."""
        encodings = bounded_backend.encode_batch(self.backend, list(texts), add_special_tokens=False)
        return [e.ids for e in encodings]

    def encode_special(self, text: str) -> list[int]:
        """The ids of `text` with the model's special tokens around it: BERT's [CLS] … [SEP], Gemma's <bos>."""
        return bounded_backend.encode(self.backend, text).ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """The ids of two texts joined by the model's special tokens, and the segment type of each token."""
        encoded = bounded_backend.encode(self.backend, first, second)
        return encoded.ids, encoded.type_ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of `ids`; special tokens are left out unless `special`."""
        return without_panic(self.backend.decode, [int(i) for i in ids], skip_special_tokens=not special)

    def token(self, i: int) -> str:
        """The text of a special token, or the vocabulary's entry of any other; empty where there is none."""
        return self.backend.id_to_token(i) or ""

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids that `encode` returns, and for each the characters of `text` that it stands for, from and up to."""
        encoded = bounded_backend.encode(self.backend, text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def chat(self, messages: Messages, add_generation_prompt: bool = False, **variables: Any) -> str:
        """Messages (`role`, `content`) as one text; `variables` are further ones of the template, such as `tools`.

        Raises UserError if the template is missing or refuses them.
        """
        return self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables).text

    def render_chat(self, messages: Messages, **variables: Any) -> Rendered:
        """As `chat`, with the characters that the template marks as generated."""
        variables = {"add_generation_prompt": False, "tools": None, "documents": None, **variables}
        template = chat_template.select_template(self.config.get("chat_template"), variables["tools"])
        special = {key: self._text(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return chat_template.render(template, messages, **{**special, **variables})

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which transformers reads."""
        self.backend.save(str(directory / "tokenizer.json"), pretty=False)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def load_tokenizer(directory: Path, hf_config: Mapping[str, Any], stop_ids: Sequence[int] = ()) -> Tokenizer:
    """The tokenizer of a Hugging Face directory; `stop_ids` are further tokens at which generation ends.

    Raises UserError for a missing or corrupt file, naming it.
    """
    backend, defaults = _backend(directory)
    special, config = (
        _read_optional(directory / name) for name in ("special_tokens_map.json", "tokenizer_config.json")
    )
    generation = _read_optional(directory / "generation_config.json", GenerationConfig)
    config = defaults | special | {key: value for key, value in config.items() if value is not None}
    for key in ("bos", "eos", "pad"):
        token = next((backend.id_to_token(i) for i in token_ids(hf_config.get(f"{key}_token_id"))), None)
        if not config.get(f"{key}_token") and token is not None:
            config[f"{key}_token"] = token
    template = directory / "chat_template.jinja"
    if not is_missing(template):
        config["chat_template"] = _read_template(template)
    stops = generation.get("eos_token_id", hf_config.get("eos_token_id"))
    try:
        return Tokenizer(backend, config, [*token_ids(stops), *stop_ids])
    except UserError as e:
        raise UserError(f"{directory}: {e}") from None


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has a `tokenizer.json`, or a vocabulary that is converted to one."""
    return not is_missing(directory / "tokenizer.json") or bool(convert_tokenizer.find_vocabulary(directory))


def _backend(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """`(backend, what else is known where the folder has no tokenizer_config.json)`."""
    path = directory / "tokenizer.json"
    if is_missing(path):
        return convert_tokenizer.convert(directory)
    try:
        require_file(path, LARGEST)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    try:
        return without_panic(tokenizers.Tokenizer.from_file, str(path)), {}
    except Exception as e:  # the library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer: {e}") from None


def _read_template(path: Path) -> str:
    try:
        require_file(path, schema.LARGEST)
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None


def _read_optional(path: Path, kind: Any = TokenizerConfig) -> dict[str, Any]:
    """The object of a file, empty where there is none. Raises UserError for a value of a type that it cannot have."""
    return {} if is_missing(path) else schema.decode(path, kind)


def token_ids(value: Any) -> list[int]:
    """The ids in an entry of a config, one or a list of them; -1 and all else that can be no id stand for none."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**32]
