"""The folder of an adapter: a path, or the files of a hub id `org/name[@REVISION]`, which are fetched."""

import os
import re
import sys

from lowrank.core.paths import AnyPath, PathLike, as_path
from lowrank.pretrained import hub
from lowrank.pretrained.resolve import is_hub_id


def adapter_folder(spec: PathLike) -> AnyPath:
    """The local folder, or the one in a bucket, of the adapter `spec`. That one is fetched is said on stderr.

    With a `@REVISION`, a branch, a tag or a commit, that state is read, else the newest. The commit is said, so that
    it can be given the next time. Raises UserError for a hub adapter that cannot be fetched.
    """
    repo_id, _, revision = os.fspath(spec).partition("@")
    if os.path.exists(os.fspath(spec)) or not is_hub_id(repo_id):
        return as_path(spec)
    at = f" at revision {revision}" if revision else ""
    print(f"reading the adapter {repo_id}{at} from the hub", file=sys.stderr)
    folder = hub.download_snapshot(repo_id, revision or None, hub.ADAPTER_PATTERNS)
    if re.fullmatch("[0-9a-f]{40}", folder.name) and folder.name != revision:
        print(
            f"its commit is {folder.name}: {repo_id}@{folder.name} is this adapter, whatever follows", file=sys.stderr
        )
    return folder
