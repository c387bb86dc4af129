"""The interface between a base model and its format: named tensors in the Hugging Face convention."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np


class TensorStore(Protocol):
    """Named tensors of one checkpoint, read on demand."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in index order."""
        ...

    def names(self) -> list[str]:
        """Hugging Face names of the tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def dtype(self, name: str) -> str:
        """Storage dtype as the checkpoint states it, e.g. "BF16" or "Q4_K"."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor: float32 if it is quantised, else a read-only view in the stored dtype."""
        ...

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Read only these rows of a matrix, as float32 (n, columns); those of a stack count through its matrices."""
        ...

    def release(self) -> None:
        """Give the resident pages of memory maps back to the system."""
        ...

    def sha256s(self) -> list[str]:
        """Hex digests of `files` in their order; without files one digest of the content."""
        ...


def text_model_name(stored: str, prefixes: Mapping[str, str]) -> str | None:
    """Return the name in the text model of a tensor of a checkpoint, None if it belongs to another part.

    Args:
        stored: its name in the checkpoint.
        prefixes: prefix in the checkpoint -> prefix in the text model, e.g. {"language_model.": ""}; the first that
            matches applies. Empty for a checkpoint that is a text model.
    """
    if not prefixes:
        return stored
    return next((new + stored.removeprefix(old) for old, new in prefixes.items() if stored.startswith(old)), None)
