import subprocess
import sys

import pytest
from absl import flags

from configs import tiny as tiny_config
from launch import main

CONFIG = "--config=configs/tiny.py"
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ([CONFIG, "--workdir=w", "--config.methd.rank=3"], "'config.methd.rank' (did you mean 'config.method'?)"),
        ([CONFIG, "--workdir=w", "--config.steps.x=3"], "config.steps is not a group"),
        ([CONFIG, "--workdir=w", "--config.steps=many"], "config.steps=many"),
        ([CONFIG, "--workdir=w", "more"], "'more' is not a flag"),
        ([CONFIG, "--wrkdir=w"], "Did you mean: workdir"),
        ([CONFIG], "--workdir=DIR are both required"),
        (["--config=configs/tony.py", "--workdir=w"], "'configs/tony.py' cannot be read"),
        (["--config=README.md", "--workdir=w"], "'README.md' is not a config: invalid"),
        (["--config", "configs/tiny.py:rank", "--workdir=w"], "'rank' is not of the form KEY=VALUE"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(words, culprit, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", *words])
    flags.FLAGS.unparse_flags()
    with pytest.raises(SystemExit) as stop:
        main.parse(["main", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert culprit in error


def test_an_unknown_option_is_one_line_with_the_nearest_name_and_exit_code_2(tmp_path):
    words = [CONFIG, f"--workdir={tmp_path / 'w'}", "--config.optim.b_raito=16"]
    done = subprocess.run([sys.executable, "-m", "launch.main", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: unknown config key 'optim.b_raito' (did you mean 'optim.b_ratio'?)")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_an_option_that_the_file_does_not_list_can_be_set(monkeypatch):
    words = ["main", CONFIG, "--workdir=w", "--config.optim.b_ratio=16", "--config.method.rank=3"]
    words.append("--config.data.infill.rate=0.9")
    monkeypatch.setattr(sys, "argv", words)
    flags.FLAGS.unparse_flags()
    main.parse(words)
    assert "b_ratio" not in tiny_config.get_config().optim
    assert main._CONFIG.value.optim.b_ratio == 16
    assert main._CONFIG.value.method.rank == 3
    assert main._CONFIG.value.data.infill.rate == 0.9


@pytest.mark.parametrize(
    ("flag", "kept"), [([], ["~/.cache/lowrank/programs"]), (["--programs=p"], ["p"]), (["--programs="], [])]
)
def test_compiled_programs_are_kept_unless_a_flag_says_no(flag, kept, monkeypatch):
    folders, words = [], ["main", CONFIG, "--workdir=w", *flag]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(main, "keep_programs", folders.append)
    monkeypatch.setattr(main.loop, "run", lambda config, workdir, **options: {})
    flags.FLAGS.unparse_flags()
    flags.FLAGS["programs"].value = flags.FLAGS["programs"].default
    main.parse(words)
    main.main(words)
    assert folders == kept
