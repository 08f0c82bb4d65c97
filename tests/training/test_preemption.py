"""A run is asked to stop, and is not killed."""

import os
import signal
import time

import pytest

from lowrank.training.preemption import SIGNALS, StopSignal


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_question_and_the_old_handlers_return(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopSignal() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.requested(2)
        assert [signal.getsignal(n) for n in SIGNALS] == before  # a second one is not held back
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_several_processes_learn_of_sigint_through_the_service_that_catches_sigterm(monkeypatch):
    sent, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) == before
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", lambda *args: sent.append(args))
            signal.raise_signal(signal.SIGINT)
    assert sent == [(os.getpid(), signal.SIGTERM)]
