"""An encoder of sentence-transformers, which is loaded when it is asked for (the extra `sentences`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jcrosslora.errors import UsageError
from jcrosslora.shelf.encoders.encoder import unit_rms
from jcrosslora.text import Prompt
from jcrosslora.text.completion import prompt_text

_FIRST = 6  # major version that runs no code of a model in a local folder


class SentenceEncoder:
    """A model of sentence-transformers."""

    def __init__(self, model: str) -> None:
        """Load a model.

        Args:
            model: its hub id or folder.

        Raises:
            UsageError: the package is not installed or too old, or the model cannot be loaded, or only by its own code.
        """
        try:
            from sentence_transformers import SentenceTransformer, __version__
        except ImportError as error:
            msg = f"encoder sentences:{model} needs {error.name}, which is not installed: install "
            raise UsageError(msg + "jcrosslora[sentences], or use the encoder hidden") from error
        if int(__version__.partition(".")[0]) < _FIRST:
            msg = f"encoder sentences:{model}: sentence-transformers {__version__} would run the model's code: install "
            raise UsageError(msg + "jcrosslora[sentences], or use the encoder hidden")
        try:
            self._model: Any = SentenceTransformer(model, trust_remote_code=False)
        except Exception as error:  # whatever a model's own class raises
            if "trust_remote_code" in str(error):  # what the package advises
                msg = f"encoder sentences:{model}: needs code in the model's files, which is not run: choose another"
                raise UsageError(msg) from error
            msg = f"encoder sentences:{model}: cannot be loaded ({' '.join(str(error).split())[:200]}): check its name"
            raise UsageError(msg) from error

    def encode(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Encode prompts, float32 (P, D), each row with a root mean square of 1."""
        texts = [prompt_text(prompt) for prompt in prompts]
        return unit_rms(np.asarray(self._model.encode(texts, show_progress_bar=False), np.float32))
