"""A broken file loads or raises UserError of one line: no other error, warning, hang, or file outside its folder."""

import json
import shutil
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank import pretrained
from lowrank.adapters import peft
from lowrank.adapters.load import with_tokenizer
from lowrank.core.errors import UserError
from lowrank.core.json_types import AdapterConfig, ModelConfig, TokenizerConfig
from tests.support import broken_files as broken
from tests.support import checkpoint_files as files
from tests.support.adapted_model import adapted
from tests.support.contained import contained

SMALL = {**files.LLAMA, "num_hidden_layers": 1}
GPT2 = {**files.GPT2, "n_layer": 1}
BASES = {"llama": SMALL, "gemma3": {**files.GEMMA3, "num_hidden_layers": 1}, "gpt2": GPT2, "bert": files.BERT}
ADAPTERS = {
    "lora": {"name": "lora", "rank": 2},
    "dora": {"name": "dora", "rank": 2},
    "adalora": {"name": "adalora", "init_rank": 4, "target_rank": 2},
    "ia3": {"name": "ia3"},
    "vera": {"name": "vera", "rank": 4},
    "loha": {"name": "loha", "rank": 2},
    "lokr": {"name": "lokr", "rank": 2},
    "oft": {"name": "oft", "block": 4},
    "boft": {"name": "boft", "block": 4},
    "hira": {"name": "hira", "rank": 2},
}
NAMES = sorted(ADAPTERS) if hypothesis.settings().max_examples > 100 else ["adalora", "lora"]
KEYS = (*ModelConfig.__struct_fields__, "quantization_config", "text_config", "id2label", "eos_token_id", "torch_dtype")
TOKENIZER_KEYS = (*TokenizerConfig.__struct_fields__, "chat_template", "added_tokens_decoder", "model_max_length")
ADAPTER_KEYS = (
    *AdapterConfig.__struct_fields__,
    *(key for form in peft.FORMS.values() for key in (*form.obeyed_keys, *form.ignored_keys)),
)
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of a base, where an example fails
RANDOM = st.randoms(use_true_random=True)  # one integer is drawn, its seed
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A folder with sound checkpoints, and sound adapters of the Llama."""
    root = tmp_path_factory.mktemp("sound")
    for name, config in BASES.items():
        folder = files.directory(root / name, config)
        about = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": TEMPLATE}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.6}))
    files.directory(root / "sharded", SMALL, shards=2)
    files.gguf_twin(root / "model.gguf", SMALL, files.tensors(SMALL), "llama")
    base = pretrained.load(str(root / "llama"))
    for name in NAMES:
        params, trained = adapted(base.params, ADAPTERS[name])
        peft.save(params, base, root / "adapters" / name, trained=trained, method=ADAPTERS[name])
    return root


@pytest.fixture(scope="session")
def base(sound):
    return pretrained.load(str(sound / "llama"))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("broken")


def copy(source: Path, place: Path) -> Path:
    """A fresh copy of a folder, as `place/folder`."""
    shutil.rmtree(place / "folder", ignore_errors=True)
    return Path(shutil.copytree(source, place / "folder"))


def loads_or_says_why(folder: Path, read) -> None:
    said = "nothing"
    try:
        with contained(folder):
            read()
    except UserError as e:
        said = str(e)
    assert len(said.splitlines()) == 1, said


def use(tokenizer) -> None:
    """What commands do with a tokenizer. A template that cannot render is an error of its own."""
    ids = tokenizer.encode("w4 w5 <s>")
    tokenizer.decode(tokenizer.encode_special("w4 w6") + ids)
    tokenizer.encode_pair("w4", "w5")
    tokenizer.encode_offsets("w4 w5")
    tokenizer.chat([{"role": "user", "content": "w4"}], add_generation_prompt=True)


def load(spec) -> None:
    use(pretrained.load(str(spec)).tokenizer)


@given(rng=RANDOM, base=st.sampled_from(sorted(BASES)))
def test_config_json(rng, base, sound, place):
    folder = copy(sound / base, place)
    path = folder / "config.json"
    path.write_bytes(broken.changed_text(rng, path.read_text(), KEYS))
    loads_or_says_why(folder, lambda: load(folder))


@given(rng=RANDOM, name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]))
def test_tokenizer(rng, name, sound, place):
    folder = copy(sound / "llama", place)
    path = folder / name
    path.write_bytes(broken.changed_text(rng, path.read_text(), TOKENIZER_KEYS))
    loads_or_says_why(folder, lambda: load(folder))


@given(rng=RANDOM)
def test_safetensors(rng, sound, place):
    folder = copy(sound / "llama", place)
    path = folder / "model.safetensors"
    path.write_bytes(broken.changed_safetensors(rng, path.read_bytes()))
    loads_or_says_why(folder, lambda: load(folder))


@given(rng=RANDOM)
def test_index_of_shards(rng, sound, place):
    folder = copy(sound / "sharded", place)
    path = folder / "model.safetensors.index.json"
    path.write_bytes(broken.changed_text(rng, path.read_text()))
    loads_or_says_why(folder, lambda: load(folder))


@given(rng=RANDOM)
def test_gguf(rng, sound, place):
    shutil.rmtree(place / "folder", ignore_errors=True)
    (place / "folder").mkdir()
    path = place / "folder" / "model.gguf"
    path.write_bytes(broken.changed_bytes(rng, (sound / "model.gguf").read_bytes(), 3000))
    loads_or_says_why(path.parent, lambda: load(path))


def load_adapter(folder, base) -> None:
    about = peft.describe_adapter(folder)
    assert isinstance(about.model, dict)
    peft.load(folder, base.params, base)
    with_tokenizer(base, folder)


@given(rng=RANDOM, name=st.sampled_from(NAMES))
def test_adapter_config(rng, name, sound, place, base):
    folder = copy(sound / "adapters" / name, place)
    path = folder / "adapter_config.json"
    path.write_bytes(broken.changed_text(rng, path.read_text(), ADAPTER_KEYS))
    loads_or_says_why(folder, lambda: load_adapter(folder, base))


@given(rng=RANDOM, name=st.sampled_from(NAMES))
def test_adapter_tensors(rng, name, sound, place, base):
    folder = copy(sound / "adapters" / name, place)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(broken.changed_safetensors(rng, path.read_bytes()))
    loads_or_says_why(folder, lambda: load_adapter(folder, base))
