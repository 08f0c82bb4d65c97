"""A run is asked to stop, and is not killed."""

import os
import signal
import time

from lowrank.training.preemption import StopSignal


def test_sigterm_is_a_question_and_the_old_handler_returns():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.requested(2)
        assert signal.getsignal(signal.SIGTERM) == before  # a second one is not held back
    assert signal.getsignal(signal.SIGTERM) == before
