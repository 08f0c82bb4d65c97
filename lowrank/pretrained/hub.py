"""The Hugging Face hub: a snapshot of the files that a model or an adapter needs, never a pickle, and uploads."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from lowrank.core.errors import UserError

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
IGNORED = ("*/*", "consolidated*")  # second copies of the weights: folders of other runtimes, Mistral's own layout
# An adapter's folder may hold a merged model too, which is not fetched with it.
ADAPTER_PATTERNS = ("adapter_model.safetensors", "trained.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")


def download_snapshot(repo_id: str, revision: str | None = None, patterns: Sequence[str] = PATTERNS) -> Path:
    """The local folder of a hub model, downloaded if it is not cached. Raises UserError when the download fails.

    `revision` is a branch, a tag or a commit; None is the newest commit of the main branch. `patterns` are those of the
    files' names.
    """
    wanted = {"allow_patterns": [*patterns], "ignore_patterns": [*IGNORED]} | (
        {"revision": revision} if revision else {}
    )
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, **wanted))
    except Exception as e:  # network, permission, name: each client version has its own classes
        raise UserError(
            f"cannot fetch {repo_id!r} from the hub (and no such directory is here): {_reason(e)}"
        ) from None


def check_push(repo_id: str) -> None:
    """Raises UserError for a name that the hub does not take, and where nobody is logged in to it."""
    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
        huggingface_hub.HfApi().whoami()
    except Exception as e:  # each client version has its own classes
        raise UserError(f"cannot push to {repo_id!r}: {_reason(e)} (`hf auth login` logs in)") from None


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads the files of a folder as one commit, and returns its URL; a repository that is missing is made first.

    Raises UserError when the upload fails; the folder is as it was.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=f"Upload {folder.name}"))
    except Exception as e:
        raise UserError(f"cannot push {folder} to {repo_id!r}: {_reason(e)}") from None


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
