"""A conversation with a model, which fits into the model's context."""

from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError, plural
from lowrank.core.typing import Tokenizer
from lowrank.generation.generate import encode_prompt


class Conversation:
    """The turns so far. `dropped` counts the exchanges that were left out as the context is too short for them."""

    def __init__(self, tokenizer: Tokenizer, system: str = "") -> None:
        """`system` is the text of the system's turn; empty: there is none."""
        self.tokenizer, self.system = tokenizer, system
        self.turns: list[dict[str, str]] = []
        self.dropped = 0

    def ask(self, text: str, limit: int) -> list[int]:
        """The token ids, at most `limit`, that the model continues with its answer to `text`.

        The oldest exchanges are left out, for good, until the rest fits. Raises UserError where the text does not fit
        alone, and for what the chat template refuses; the turns then stay as they are.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        ids, first = self._encode(turns), 0
        while len(ids) > limit:
            asked = [i for i, turn in enumerate(turns) if turn["role"] == "user" and i > first]
            if not asked:
                raise UserError(f"this has {plural(len(ids), 'token')} and {limit} fit: shorten it, or lower --max_new")
            first = asked[0]
            ids = self._encode(turns[first:])
        self.dropped += sum(turn["role"] == "user" for turn in turns[:first])
        self.turns = turns[first:]
        return ids

    def answer(self, text: str) -> None:
        """Adds the model's turn."""
        self.turns.append({"role": "assistant", "content": text})

    def _encode(self, turns: list[dict[str, str]]) -> list[int]:
        system: list[Mapping[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        text = self.tokenizer.chat([*system, *turns], add_generation_prompt=True)
        return encode_prompt(self.tokenizer, text, start=False)
