"""Processes find each other by flags and variables, and their launcher names the one that fails."""

import subprocess
import sys

import jax
import pytest
from absl import flags

from launch import command, processes
from lowrank.core.errors import Diverged, InUse, UserError
from lowrank.core.exit_codes import STOPPED
from lowrank.training import workdir

ADDRESS = "host:1234"


@pytest.fixture
def connected(monkeypatch):
    """`connected(flags, variables, distributed)`: the arguments of jax.distributed.initialize, or None if uncalled."""

    def call(given, variables=(), distributed=False):
        calls = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs))
        for name, variable in processes.VARIABLES.items():
            monkeypatch.setattr(flags.FLAGS[name], "value", dict(given).get(name))
            monkeypatch.delenv(variable, raising=False)
        for name, value in dict(variables).items():
            monkeypatch.setenv(f"JAX_{name.upper()}", value)
        processes.connect(distributed)
        return calls[0] if calls else None

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return call


def test_flags_and_variables_name_the_processes_and_flags_come_first(connected):
    every = {"coordinator_address": ADDRESS, "num_processes": 4, "process_id": 3}
    variables = {"coordinator_address": ADDRESS, "num_processes": "4", "process_id": "1"}
    assert connected(every) == every
    assert connected({}, variables) == {**every, "process_id": 1}
    assert connected({"process_id": 3}, variables) == every
    assert connected({}) is None
    assert connected({}, distributed=True) == {}  # a cluster that JAX knows
    assert connected({}, {"coordinator_address": ADDRESS}) is None


@pytest.mark.parametrize(
    ("given", "variables", "message"),
    [
        ({"num_processes": 2}, {}, "--coordinator_address is missing, and JAX_COORDINATOR_ADDRESS is not set"),
        ({"coordinator_address": ADDRESS, "process_id": 0}, {}, "--num_processes is missing"),
        ({"coordinator_address": ADDRESS, "num_processes": 2, "process_id": 2}, {}, "process_id=2 is not an index of"),
        ({"coordinator_address": ADDRESS}, {"num_processes": "two"}, "JAX_NUM_PROCESSES=two is not a number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(connected, given, variables, message):
    with pytest.raises(UserError, match=message):
        connected(given, variables)


def launch(code, count=3, marker=""):
    """`(exit code, stderr)` of a launcher whose processes run Python code, in which `i` is their index."""
    child = f"import os, signal, time; i = int(os.environ['JAX_PROCESS_ID']); marker = {str(marker)!r}; {code}"
    start = f"sys.exit(p.run_locally({count}, {[sys.executable, '-c', child]}))"
    parent = f"import sys; from launch import processes as p; p.GRACE = 0.1; {start}"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


ABORT_AFTER_PROCESS_0 = """
if i == 0:
    open(marker, 'x').close()
    os.kill(os.getpid(), 9)
while not os.path.exists(marker):
    time.sleep(0.01)
time.sleep(0.3)
os.abort()
"""


@pytest.mark.parametrize(
    ("code", "returncode", "said"),
    [
        ("time.sleep(600) if i != 1 else os.kill(os.getpid(), 9)", 128 + 9, "process 1 of 3 was killed by SIGKILL"),
        (ABORT_AFTER_PROCESS_0, 128 + 9, "process 0 of 3 was killed by SIGKILL"),
        ("time.sleep(600) if i else exit(2)", 2, "process 0 of 3 ended with exit code 2"),
        (f"exit({STOPPED})", STOPPED, ""),
        ("assert os.environ['JAX_NUM_PROCESSES'] == '3'", 0, ""),
    ],
)
def test_the_launcher_names_the_process_that_fails_and_ends_the_others(code, returncode, said, tmp_path):
    found, stderr = launch(code, marker=tmp_path / "process 0 ends")
    assert found == returncode
    assert stderr == (f"error: {said}; the others are ended\n" if said else "")


def test_a_signal_to_the_launcher_reaches_process_0():
    stop = "signal.signal(15, lambda *_: exit(42)) if i == 0 else exit(42)"
    code = f"{stop}; os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    assert launch(code) == (STOPPED, "")


def test_a_run_that_diverged_has_a_code_of_its_own(capsys):
    assert command.print_error(Diverged("loss is nan")) == 3
    assert command.print_error(InUse("held")) == 2
    assert command.print_error(UserError("no")) == 2
    assert capsys.readouterr().err == "error: loss is nan\nerror: held\nerror: no\n"


@pytest.mark.parametrize(("flags", "code"), [((), 2), (("--in_use=stop",), 42)])
def test_a_folder_that_another_run_holds_is_refused_or_tried_again(files, tmp_path, flags, code):
    words = [f"--config.model.name={files / 'llama'}", f"--config.data.source=jsonl:{files / 'records.jsonl'}"]
    run = [sys.executable, "-m", "launch.main", "--config=configs/tiny.py", f"--workdir={tmp_path}", *words, *flags]
    with workdir.lock(tmp_path):
        done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert "is in use by another run" in done.stderr
