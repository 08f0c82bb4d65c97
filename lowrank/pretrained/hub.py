"""The Hugging Face hub: a snapshot of the files that a model or an adapter needs, never a pickle, and uploads."""

import concurrent.futures
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from lowrank.core.errors import UserError

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
IGNORED = ("*/*", "consolidated*")  # second copies of the weights: folders of other runtimes, Mistral's own layout
# An adapter's folder may hold a merged model too, which is not fetched with it.
ADAPTER_PATTERNS = ("adapter_model.safetensors", "trained.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")


def download_snapshot(repo_id: str, revision: str | None = None, patterns: Sequence[str] = PATTERNS) -> Path:
    """The local folder of a hub model, downloaded if it is not cached.

    `revision` is a branch, a tag or a commit; None is the newest commit of the main branch. `patterns` are those of the
    files' names. Raises UserError when the download fails, and for a cached file that is not the one whose hash is its
    name.
    """
    wanted = {"allow_patterns": [*patterns], "ignore_patterns": [*IGNORED]} | (
        {"revision": revision} if revision else {}
    )
    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, **wanted))
    except Exception as e:  # network, permission, name: each client version has its own classes
        raise UserError(
            f"cannot fetch {repo_id!r} from the hub (and no such directory is here): {_reason(e)}"
        ) from None
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for _ in threads.map(_verify, sorted(path for path in folder.iterdir() if path.is_symlink())):
            pass
    return folder


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


def _verify(link: Path) -> None:
    """The cache names large files by their SHA-256, and small ones as git does, by the SHA-1 of size and content."""
    file = link.resolve()
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", file.name):
        return
    large = len(file.name) == 64
    try:
        with file.open("rb") as f:
            start = hashlib.sha256() if large else hashlib.sha1(f"blob {file.stat().st_size}\0".encode())
            found = hashlib.file_digest(f, start.copy).hexdigest()
    except OSError as e:
        raise UserError(f"{link} cannot be read from the cache: {e.strerror or e}") from None
    if found != file.name:
        raise UserError(f"{link} is not the file that was downloaded: delete {file} to fetch it again")
