"""The interface between a base model and its format: named tensors in the Hugging Face convention."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class FileNames:
    """How the names of tensors in a checkpoint differ from those of the text model's class.

    Attributes:
        prefixes: prefix in the checkpoint -> prefix in the text model, e.g. {"language_model.": ""}; the first that
            matches applies, and tensors without any belong to another part. Empty for a checkpoint that is a text
            model.
        modules: see `Family.file_modules`.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)

    def parts(self, stored: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Map the name of each tensor in the text model to those in the checkpoint that hold its rows, in order.

        Args:
            stored: all names in the checkpoint.
        """
        found: dict[str, dict[int, str]] = {}
        for one in stored:
            name, place = self._named(one)
            if name is not None:
                found.setdefault(name, {})[place] = one
        return {name: tuple(held[place] for place in sorted(held)) for name, held in found.items()}

    def _named(self, stored: str) -> tuple[str | None, int]:
        """Return the name in the text model, None in another part; and the place in `modules` of the other, or -1."""
        name = stored
        if self.prefixes:
            known = (old for old in self.prefixes if stored.startswith(old))
            if (prefix := next(known, None)) is None:
                return None, -1
            name = self.prefixes[prefix] + stored.removeprefix(prefix)
        pieces = name.split(".")
        module = ".".join(pieces[3:-1])
        if module not in self.modules:
            return name, -1
        return ".".join((*pieces[:3], self.modules[module], pieces[-1])), [*self.modules].index(module)
