"""The exit codes of a run, by which a worker and every engine know what to do next."""

DONE = 0
STOPPED = 42  # the run was asked to stop, and the same command continues it
BAD_INPUT, DIVERGED = 2, 3  # the same command would fail again
