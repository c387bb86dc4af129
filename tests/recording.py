"""Bases that write down what is read of them."""

import dataclasses

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.store import TensorStore


class RecordingStore:
    """A store that passes everything on and lists what was read.

    Attributes:
        read: names of tensors, whole or in part, and "sha256s" for the digests of the files.
        row_counts: how many rows each partial read asked for.
    """

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self.read: list[str] = []
        self.row_counts: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def tensor(self, name: str) -> np.ndarray:
        self.read.append(name)
        return self._store.tensor(name)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        self.read.append(name)
        self.row_counts.append(len(ids))
        return self._store.rows(name, ids)

    def sha256s(self) -> list[str]:
        self.read.append("sha256s")
        return self._store.sha256s()


def recorded(base: BaseModel) -> tuple[BaseModel, RecordingStore]:
    """The same base, and the record of what is read of it from now on."""
    store = RecordingStore(base.store)
    return dataclasses.replace(base, store=store), store
