"""A model that writes one text at a time, which is seen while it is written."""

from collections.abc import Callable, Sequence
from typing import Any

from lowrank.core.errors import UserError
from lowrank.generation.generator import Generator, Request, Sizes, check_request
from lowrank.generation.prompt_batches import bucket
from lowrank.generation.text_stream import TextStream
from lowrank.models import DecoderConfig, build_model

SLOTS = 256  # the least, so that a conversation that begins compiles nothing for a while


class Voice:
    """A pretrained model for `write`. Its cache grows by doubling, so that few programs are compiled."""

    def __init__(self, pretrained: Any) -> None:
        """Raises UserError for a model that writes no text."""
        check_decoder(pretrained)
        self.pretrained = pretrained
        self._generator: Generator | None = None

    def write(
        self,
        request: Request,
        stop: Sequence[str],
        show: Callable[[str], Any],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> str:
        """The text of a request, whose parts are given to `show` as they come, up to a `stop` string.

        The text ends early where `interrupted` returns True. Raises UserError as `generator.check_request` does.
        """
        check_request(self.pretrained.config, request)
        stream, tokens = TextStream(self.pretrained.tokenizer, stop, request.stop_ids), list[int]()
        for tokens in self._sized(request).stream(request):
            show(stream.push(tokens))
            if stream.is_complete(tokens) or interrupted():
                break
        show(stream.push(tokens, last=True))
        return stream.text(tokens)

    def _sized(self, request: Request) -> Generator:
        """A generator with a cache for the request: the one before if it is large enough."""
        p, stops = self.pretrained, len(set(request.stop_ids))
        now = self._generator.sizes if self._generator else Sizes(0, 0, 0, 0)
        needed = len(request.ids) + request.max_new + p.config.num_virtual_tokens
        if needed > now.slots or request.max_new > now.max_new or stops > now.stops:
            slots = min(max(SLOTS, 2 ** (needed - 1).bit_length()), p.config.max_length)
            sizes = Sizes(1, slots, bucket(request.max_new), 8 * max(1, -(-stops // 8)))
            self._generator = None  # frees the cache before the larger one is made
            self._generator = Generator(build_model(p.config), p.params, sizes, p.bind)
        assert self._generator is not None
        return self._generator


def check_decoder(pretrained: Any) -> None:
    """Raises UserError for an encoder and for a classifier, which write no text."""
    c = pretrained.config
    if not isinstance(c, DecoderConfig) or c.num_labels:
        kind = "a classifier" if c.num_labels else "an encoder"
        raise UserError(f"{pretrained.name} is {kind}, which writes no text: name a causal language model")
