"""Models of the Hugging Face hub: a snapshot of the files that a model needs, never a pickle."""

from pathlib import Path

import huggingface_hub

from lowrank.core.errors import UserError

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
IGNORED = ("*/*", "consolidated*")  # second copies of the weights: folders of other runtimes, Mistral's own layout


def download_snapshot(repo_id: str, revision: str | None = None) -> Path:
    """The local folder of a hub model, downloaded if it is not cached. Raises UserError when the download fails.

    `revision` is a branch, a tag or a commit; None is the newest commit of the main branch.
    """
    wanted = {"allow_patterns": [*PATTERNS], "ignore_patterns": [*IGNORED]} | (
        {"revision": revision} if revision else {}
    )
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, **wanted))
    except Exception as e:  # network, permission, name: each client version has its own classes
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(f"cannot fetch {repo_id!r} from the hub (and no such directory is here): {reason}") from None
