"""Files that grow, such as logs: an object of a bucket cannot be appended to, so it is copied from a local file."""

import pathlib
import shutil
import tempfile
import time
import weakref

from lowrank.core.files import write_bytes
from lowrank.core.paths import PathLike, as_path, in_bucket


class Mirror:
    """A local folder to append in, whose files are copied to a folder of a bucket; a local folder is its own mirror."""

    def __init__(self, folder: PathLike):
        self.folder = as_path(folder)
        self._apart = in_bucket(folder)
        self.local = pathlib.Path(tempfile.mkdtemp(prefix="lowrank-") if self._apart else self.folder)
        if self._apart:
            weakref.finalize(self, shutil.rmtree, self.local, ignore_errors=True)
        self._sizes: dict[pathlib.Path, int] = {}  # of the copied files
        self._copied, self._took = -float("inf"), 0.0  # the time of the last copy, and the seconds that it took

    def copy(self, every_seconds: float = 0.0) -> None:
        """Copies the files that have grown, whole, unless the last copy is less than `every_seconds` old.

        With `every_seconds`, copies take at most a twentieth of the time. Raises UserError if the bucket cannot be
        written.
        """
        began = time.monotonic()
        if not self._apart or (every_seconds and began - self._copied < max(every_seconds, 20 * self._took)):
            return
        for path in sorted(p for p in self.local.rglob("*") if p.is_file()):
            data = path.read_bytes()
            if self._sizes.get(path) != len(data):
                write_bytes(self.folder / path.relative_to(self.local).as_posix(), data)
                self._sizes[path] = len(data)
        self._copied = time.monotonic()
        self._took = self._copied - began
