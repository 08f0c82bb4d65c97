"""Small inputs that go wrong where a reader guesses: each case tries one, says what came back, and exits with 0 if it
is right. `python tests/cases/NAME.py` runs one alone."""

import gc
import os
import runpy
from pathlib import Path

import huggingface_hub
import pytest

HERE = Path(__file__).parent
UNRAISABLE = "pytest.PytestUnraisableExceptionWarning"
CASES = [
    "adapter_about_its_base",
    "bert_gamma_beta",
    "config_beyond_its_file",
    "ctrl_c",
    "data_changed_midrun",
    "dataset_folder_runs_code",
    "embeddings_in_adapter",
    "generation_config_lost",
    "generation_tag",
    "gguf_without_pre",
    "home_folder",
    "json_beyond_python",
    "lone_surrogate",
    "merged_file_modes",
    "negative_pad_id",
    "one_of_two_refuses",
    "overlong_record",
    "reasoning_turns",
    "rope_theta_beside",
    "sentencepiece_pieces",
    "tied_head_lora",
    "tied_modules_to_save",
    "tojson_arguments",
    "token_beyond_vocabulary",
    "tokenizer_config_types",
    "tool_calls",
]

# A script leaves its files to the end of its process.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("ResourceWarning", UNRAISABLE)]


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """The state of the process that cases change; their own processes have one device."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", huggingface_hub.snapshot_download)
    mask = os.umask(0o022)
    yield
    os.umask(mask)
    gc.collect()  # what the script has left open is closed here, under the marks above, not in a later test


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
