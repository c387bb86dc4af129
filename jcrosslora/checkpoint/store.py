"""What a base model needs from its file format: named tensors in the Hugging Face convention."""

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
        """Shape of a tensor, from the file's header."""
        ...

    def dtype(self, name: str) -> str:
        """Storage dtype as the file states it, e.g. "BF16" or "Q4_K"."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """The tensor, float32 where the file is quantised, else a view in the stored dtype."""
        ...

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """float32 (n, columns): only these rows of a matrix are read."""
        ...

    def release(self) -> None:
        """Give resident pages of the memory maps back."""
        ...

    def sha256s(self) -> list[str]:
        """Hex digests of `files`, in their order."""
        ...
