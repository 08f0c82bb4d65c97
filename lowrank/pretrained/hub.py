"""Models of the Hugging Face hub: a snapshot of the files that are needed, never a pickle."""

from pathlib import Path

import huggingface_hub

from lowrank.core.errors import UserError

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
OTHERS = ("*/*", "consolidated*")  # the same weights once more: in folders of other runtimes, in Mistral's own layout


def snapshot(repo_id: str) -> Path:
    """The local folder of a hub model, downloaded if need be. Raises UserError when it cannot be had."""
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=[*PATTERNS], ignore_patterns=[*OTHERS]))
    except Exception as e:  # network, permission, name: each client version has its own classes
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(f"cannot fetch {repo_id!r} from the hub (and no such directory is here): {reason}") from None
