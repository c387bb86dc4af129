"""`TorchModel`: what has to be known of a source that transformers and PEFT run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TorchModel:
    """A base that transformers runs.

    Attributes:
        ref: a folder, a GGUF file or a hub id.
        revision: of a hub id.
        tokenizer: a folder, a file or a hub id; None is beside the weights.
        chat_template: a file with the template that takes the place of the tokenizer's own.
        device: such as "cpu" or "cuda:1"; None takes a GPU if torch has one.
    """

    ref: str | Path
    revision: str | None = None
    tokenizer: str | Path | None = None
    chat_template: str | Path | None = None
    device: str | None = None
