"""Studies: they compare rows (a method on a base) on common tasks, and record the scores and the compute of each."""

import time

BEGAN = time.monotonic()  # the start of this process, before the imports that take seconds
