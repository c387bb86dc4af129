"""A base model: its modules, its tensors on demand, its vocabulary and its identity."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jcrosslora.checkpoint.config import Dims
from jcrosslora.checkpoint.families import EMBEDDING, HEAD, Family
from jcrosslora.checkpoint.layout import Module
from jcrosslora.checkpoint.store import TensorStore
from jcrosslora.checkpoint.vocabulary import Vocabulary, read_tokenizer
from jcrosslora.errors import CheckpointError


class Digests(Protocol):
    """Whoever remembers the digests of files."""

    def sha256s(self, paths: Sequence[Path], compute: Callable[[], list[str]]) -> list[str]:
        """Hex digests of files: those remembered, or else what `compute` reads."""
        ...


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model whose files have been checked; arrays are read when asked for.

    Attributes:
        name: what adapters of this model should name as their base. In this order: the name given to `open_base`; the
            hub id, also where the path lies in a hub cache; for GGUF the source repository of its metadata, then
            `general.name`; else the path. Neither `_name_or_path` of config.json nor `general.base_model` of a GGUF is
            used: in a model that was trained further they name the one that it was trained from.
        ref: what was given to `open_base`.
        path: the folder, or the GGUF file.
        revision: commit of a hub model, else None.
        family: its architecture.
        config: its configuration with Hugging Face keys; for GGUF translated from the metadata.
        dims: its sizes.
        modules: every linear module by its Llama-style name: by layer, then q, k, v, o, gate, up, down.
        fused: module that the model really has -> ((logical name, first row, last row exclusive), ...).
        store: the tensors.
    """

    name: str
    ref: str
    path: Path
    revision: str | None
    family: Family
    config: Mapping[str, Any]
    dims: Dims
    modules: Mapping[str, Module]
    fused: Mapping[str, tuple[tuple[str, int, int], ...]]
    store: TensorStore

    @property
    def embedding_name(self) -> str:
        """Hugging Face name of the input embedding."""
        return EMBEDDING

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        return bool(self.config.get("tie_word_embeddings", self.family.tied))

    def tensor_names(self) -> list[str]:
        """Hugging Face names of the tensors in the files."""
        return self.store.names()

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by its Hugging Face name and in its convention; the head of a tied model is the embedding.

        Returns:
            A read-only view in the stored dtype; float32 where the file is quantised.

        Raises:
            CheckpointError: no such tensor, or a dtype that cannot be read.
        """
        return self.store.tensor(self._stored_name(name))

    def weight(self, module_name: str) -> np.ndarray:
        """(O, I) of a logical module, see `tensor`.

        Raises:
            CheckpointError: no such module, or a dtype that cannot be read.
        """
        module = self._module(module_name)
        array = self.store.tensor(module.tensor)
        return array if module.rows is None else array[slice(*module.rows)]

    def stored_weight(self, name: str) -> np.ndarray:
        """(O, I) of a module as the model has it: a logical one, or a fused one as a whole; see `tensor`.

        Raises:
            CheckpointError: no such module, or a dtype that cannot be read.
        """
        return self.weight(name) if name in self.modules else self.tensor(f"{name}.weight")

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """float32 (n, columns): rows of a matrix, e.g. of the embedding; the others are not read.

        Args:
            name: Hugging Face name of a matrix.
            ids: (n,) integers.

        Raises:
            CheckpointError: no such tensor, not a matrix, or a row that it does not have.
        """
        stored, ids = self._stored_name(name), np.asarray(ids)
        shape = self.store.shape(stored)
        inside = ids.size == 0 or 0 <= int(ids.min()) <= int(ids.max()) < shape[0]
        if len(shape) != 2 or ids.ndim != 1 or not inside:
            msg = f"{self.ref}: rows of {name!r} with shape {list(shape)} were asked for that it does not have"
            raise CheckpointError(msg)
        return self.store.rows(stored, ids.astype(np.int64))

    def residual_gain(self, module_name: str) -> np.ndarray:
        """float32 (hidden,): the norm's gain between the residual stream and a module.

        For q, k, v, gate and up the gain of the norm in front of them; for o and down that of the norm behind them,
        ones where the family has none. Gemma's gain, 1 + weight, is already summed.

        Raises:
            CheckpointError: no such module.
        """
        module = self._module(module_name)
        norm = self.family.norm_in.get(module.role) or self.family.norm_out.get(module.role)
        if norm is None:
            return np.ones(self.dims.hidden, np.float32)
        weight = self.tensor(f"model.layers.{module.layer}.{norm}.weight").astype(np.float32)
        with np.errstate(invalid="ignore"):  # NaN is found, and refused, where the gain is used.
            return weight + np.float32(self.family.gain_offset)

    def vocabulary(self) -> Vocabulary:
        """The normal tokens as bytes, or the reason why they cannot be read."""
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        own = getattr(self.store, "vocabulary", None)
        return own() if own is not None else read_tokenizer(self.path, self.dims.vocab)

    def digest(self, digests: Digests | None = None) -> str:
        """Identity of the weights: "sha256:" and a hex digest.

        Of one file its SHA-256; of several the SHA-256 of their hex digests, one a line, in index order. The files are
        read at the first call alone.

        Args:
            digests: remembers digests of files between runs, so that these need not be read; None reads them.
        """
        if "_digest" not in self.__dict__:
            read = self.store.sha256s
            parts = read() if digests is None else digests.sha256s(self.store.files, read)
            joined = "\n".join(parts).encode()
            # As a cached property does, which takes no argument: the record is frozen, and this is none of its fields.
            self.__dict__["_digest"] = parts[0] if len(parts) == 1 else hashlib.sha256(joined).hexdigest()
        return f"sha256:{self.__dict__['_digest']}"

    def release(self) -> None:
        """Give the resident pages of the memory maps back to the system; arrays stay valid."""
        self.store.release()

    def _module(self, name: str) -> Module:
        if name not in self.modules:
            msg = f"{self.ref}: has no module {name!r}"
            raise CheckpointError(msg)
        return self.modules[name]

    def _stored_name(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self.tied else name
