"""Scores of long contexts beside a plain loop in float64, and beside texts that the model writes."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.evaluation import long_context
from lowrank.evaluation.evaluator import EvalConfig
from lowrank.evaluation.long_context import Cell, LongConfig, Prompt, Reader
from lowrank.generation.generate import generate
from lowrank.pretrained.tokenizer import load_tokenizer
from tests.support.close import assert_close
from tests.support.tiny_models import decoder, tokens

WINDOW, STRIDE = 12, 5
model = functools.cache(decoder)


def reader(**options):
    network, params = model("llama")
    return Reader(network, params, rows=3, chunk_tokens=8, **options)


@functools.cache
def documents():
    return [row[:n] for row, n in zip(tokens(4, 40), (40, 2, 13, 14), strict=True)]


@functools.cache
def plain_scores(window, stride):
    """`[(nll, seen)]` by one pass of the model for each prediction, with the softmax in float64."""
    network, params = model("llama")
    logits = jax.jit(lambda ids: network.apply({"params": params}, ids[None])[0])
    found = []
    for ids in documents():
        for predicted in range(1, len(ids)):
            start = 0
            while start + window < predicted:  # the first window that holds all tokens before it
                start += stride
            seen = np.zeros(window, np.int32)  # what follows the last token changes nothing before it
            seen[: predicted - start] = ids[start:predicted]
            row = np.asarray(logits(seen)[predicted - start - 1], np.float64)
            found.append((np.log(np.sum(np.exp(row))) - row[ids[predicted]], predicted - start))
    return np.array(found)


@pytest.mark.parametrize("stride", [STRIDE, WINDOW])
def test_each_token_is_scored_once_as_a_plain_loop_scores_it(stride):
    scores = long_context.token_scores(reader(), documents(), WINDOW, stride)
    nll, seen = plain_scores(WINDOW, stride).T
    assert_close(scores.nll, nll)
    np.testing.assert_array_equal(scores.seen, seen)
    assert_close(scores.perplexity, np.exp(nll.mean()))
    assert len(nll) == sum(len(ids) - 1 for ids in documents())


@pytest.mark.all
def test_scores_are_those_of_any_mesh_and_any_batch():
    mesh = sharding.make_mesh(2, 1, 1, 2)
    sharded = dataclasses.replace(reader(mesh=mesh), rows=4, chunk_tokens=0)
    expected = long_context.token_scores(reader(), documents(), 11, STRIDE)
    assert_close(long_context.token_scores(sharded, documents(), 11, STRIDE).nll, expected.nll)


@pytest.mark.parametrize(("predictions", "window", "stride"), [(1, 4, 4), (9, 4, 1), (9, 4, 3), (8, 4, 4), (3, 9, 2)])
def test_windows_score_every_prediction_once(predictions, window, stride):
    found = list(long_context.windows(predictions, window, stride))
    assert [p for _, first, stop in found for p in range(first, stop)] == list(range(predictions))
    assert all(stop - start <= window for start, _, stop in found)
    assert all(first - start >= window - stride for start, first, _ in found[1:])


def test_perplexity_by_position_is_that_of_the_tokens_of_each_bin():
    scores = long_context.token_scores(reader(), documents(), WINDOW, WINDOW)
    rows = long_context.by_position(scores, 3)
    assert [(row["first"], row["last"]) for row in rows] == [(1, 4), (5, 8), (9, 12)]
    nll, seen = plain_scores(WINDOW, WINDOW).T
    for row in rows:
        of = nll[(row["first"] <= seen) & (seen <= row["last"])]
        assert row["tokens"] == len(of)
        assert_close([row["nll"], row["perplexity"]], [of.mean(), np.exp(of.mean())])


class Letters:
    """A tokenizer that decodes every token as its own."""

    @staticmethod
    def decode(ids):
        return "a" if ids[0] % 2 else "."


def test_an_answer_is_found_where_the_model_writes_it_and_then_ends_it():
    network, params = model("llama")
    starts = [row.tolist() for row in tokens(8, 9)]
    starts = [ids[: 4 + i % 5] for i, ids in enumerate(starts)]
    written = generate(network, params, starts, max_new=4)
    asked = [Prompt(ids, answer[:3]) for ids, answer in zip(starts, written, strict=True)]
    ends = [answer[3] % 2 == 0 for answer in written]
    assert len(set(ends)) == 2
    assert long_context.found(reader(), Letters, asked, 12) == ends
    wrong = [Prompt(p.ids, [*p.answer[:2], (p.answer[2] + 1) % 43]) for p in asked]
    assert long_context.found(reader(), Letters, wrong, 12) == [False] * 8


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "pad_token": "<end>"}))
    return load_tokenizer(folder, {})


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_pass_key_stands_at_its_depth_in_a_prompt_of_its_length(bytes_tokenizer, depth):
    ask = functools.partial(long_context.prompts, "passkey", bytes_tokenizer, 600, depth, samples=3)
    asked = ask(seed=1)
    for prompt in asked:
        text, key = (bytes_tokenizer.decode(ids) for ids in (prompt.ids, prompt.answer))
        assert len(prompt.ids) + len(prompt.answer) == 600
        assert text.count(key.strip()) == 2
        assert text.endswith("The pass key is")
        head, _, tail = text.removesuffix("\nWhat is the pass key? The pass key is").partition("\nThe pass key is")
        before = len(head) - len(long_context.retrieval.INTRODUCTION)
        after = len(tail.partition("is the pass key.\n")[2])
        assert abs(before - depth * (before + after)) <= 1
    assert asked == ask(seed=1) != ask(seed=2)
    assert len({tuple(prompt.answer) for prompt in asked}) == 3


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 10), (1.0, 20)])
def test_a_key_stands_at_its_depth_among_as_many_as_fit(bytes_tokenizer, depth, place):
    for prompt in long_context.prompts("kv", bytes_tokenizer, 540, depth, samples=3):
        text = bytes_tokenizer.decode(prompt.ids)
        listed = json.loads(text[text.index("{") : text.index("}") + 1])
        key = text.rpartition('Key: "')[2].partition('"')[0]
        assert list(listed).index(key) == place
        assert len({*listed, *listed.values()}) == 2 * len(listed) == 42
        assert listed[key] == bytes_tokenizer.decode(prompt.answer)
        assert 540 - 19 < len(prompt.ids) + len(prompt.answer) <= 540


def test_retrieval_is_a_table_a_heat_map_and_a_csv(tmp_path):
    cells = [Cell("kv", n, depth, 4, found) for n, depth, found in [(8, 0.0, 0.25), (8, 1.0, 0.5), (16, 0.0, 1.0)]]
    cells.append(Cell("kv", 16, 1.0, 4, 0.0))
    rows = [{"first": 1, "last": 4, "tokens": 9, "nll": 1.5, "perplexity": 4.5}]
    paths = long_context.write(long_context.LongScores({}, cells, rows), tmp_path)
    assert [path.name for path in paths] == ["retrieval.csv", "kv.md", "kv.png", "positions.csv"]
    assert paths[0].read_text().splitlines()[:2] == ["task,length,depth,prompts,found", "kv,8,0.0,4,0.25"]
    expected = ["| depth | 8 tokens | 16 tokens |", "| --- | ---: | ---: |", "| 0 | 25% | 100% |", "| 1 | 50% | 0% |"]
    assert paths[1].read_text().splitlines() == expected
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert paths[3].read_text().splitlines() == ["first,last,tokens,nll,perplexity", "1,4,9,1.5,4.5"]


def test_the_price_is_taken_at_the_context_of_the_base():
    network, params = model("llama")
    longer = Reader(decoder("llama", context=64, rope="linear")[0], params, rows=3)
    texts = [np.concatenate([*documents()] * 2)]
    base = Reader(network, params, rows=3)
    found = long_context.score(["price", "sliding"], longer, Letters, texts, LongConfig(stride=8), base).scores
    before = long_context.token_scores(base, texts, 32, 8)
    after = long_context.token_scores(longer, texts, 32, 8)
    assert_close(found["price_nats"], after.nll.mean() - before.nll.mean())
    assert found["old_context"] == 32
    assert_close(found["old_context_perplexity_before"], before.perplexity)
    assert_close(found["sliding_perplexity"], long_context.token_scores(longer, texts, 64, 8).perplexity)
    with pytest.raises(UserError, match="price compares with a base of a shorter context, and the model has the 32"):
        long_context.score(["price"], base, Letters, texts, LongConfig(), base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (16, 33)}, r"eval.long.lengths has 33, and the model has 32 positions: set it to 2..32"),
        ({"window": 40}, r"eval.long.window has 40, and the model has 32 positions"),
        ({"window": 8, "stride": 9}, r"eval.long.stride=9 exceeds eval.long.window=8"),
        ({"depths": (0.5, 1.5)}, r"eval.long.depths=\(0.5, 1.5\) must be numbers in \[0, 1\]"),
        ({"samples": 0}, r"eval.long.samples=0 is below 1"),
        ({"filler": "dat"}, r"unknown eval.long.filler 'dat' \(did you mean 'data'"),
    ],
)
def test_settings_that_cannot_be_scored_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LongConfig(**settings).of_context(32)


def test_what_cannot_be_asked_is_refused(bytes_tokenizer):
    with pytest.raises(UserError, match=r"unknown retrieval task 'passkeys' \(did you mean 'passkey'"):
        long_context.prompts("passkeys", bytes_tokenizer, 600, 0.0, samples=1)
    with pytest.raises(UserError, match=r"a passkey prompt needs 2\d\d tokens, and a length is 100: raise it"):
        long_context.prompts("passkey", bytes_tokenizer, 100, 0.0, samples=1)
    with pytest.raises(UserError, match=r"a kv prompt needs 1\d\d tokens, and a length is 60: raise it"):
        long_context.prompts("kv", bytes_tokenizer, 60, 0.0, samples=1)
    with pytest.raises(UserError, match=r"a stride of 9 is not in 1..8"):
        long_context.token_scores(reader(), documents(), 8, 9)
    with pytest.raises(UserError, match=r"unknown config key 'eval.long.window_size' \(did you mean"):
        EvalConfig(split="test", long={"window_size": 3})
    with pytest.raises(UserError, match=r"need held-out data: set eval\.split"):
        long_context.score(["sliding"], reader(), bytes_tokenizer, [], LongConfig())
