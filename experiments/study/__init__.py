"""Studies: rows on common tasks, their cells, and what they took."""

import time

BEGAN = time.monotonic()  # of this process, before it imports what takes seconds
