"""The names of encoders, and how one is opened by its name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import UsageError, suggestion
from jcrosslora.shelf.encoders.encoder import Encoder
from jcrosslora.shelf.encoders.hidden_states import HiddenStates
from jcrosslora.shelf.encoders.sentences import SentenceEncoder
from jcrosslora.text import Prompt

HIDDEN, SENTENCES, NOTHING = "hidden", "sentences", "none"
_DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


class NoEncoder:
    """Makes vectors of no numbers, for a shelf that is searched by words or by certainty alone."""

    def encode(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return float32 (P, 0)."""
        return np.zeros((len(prompts), 0), np.float32)


def check_encoder(name: str) -> str:
    """Check a name and make it whole: "hidden", "none", or "sentences:MODEL".

    Raises:
        UsageError: the name is unknown.
    """
    kind, _, model = name.partition(":")
    if kind == SENTENCES:
        return f"{SENTENCES}:{model or _DEFAULT_MODEL}"
    if name not in (HIDDEN, NOTHING):
        known = (HIDDEN, SENTENCES, NOTHING)
        msg = f"encoder {name!r} is unknown{suggestion(kind, known)}; use {HIDDEN}, {SENTENCES}:MODEL or {NOTHING}"
        raise UsageError(msg)
    return name


def open_encoder(name: str, base: BaseModel) -> Encoder:
    """Load an encoder, whose name `check_encoder` has made whole.

    Raises:
        UsageError: sentence-transformers is not installed, or does not have the model.
        CheckpointError: the base cannot be read, or is not supported by the decoder.
    """
    if name == NOTHING:
        return NoEncoder()
    if name == HIDDEN:
        return HiddenStates.of(base)
    return SentenceEncoder(name.partition(":")[2])
