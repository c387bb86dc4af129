"""A base model: its modules, vocabulary, identity, and tensors, which are read on demand."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.architectures import Architecture, Dims, Family
from jcrosslora.architectures.architecture import layers_with
from jcrosslora.architectures.blocks import EMBEDDING, HEAD, WRITERS
from jcrosslora.architectures.config import read_number
from jcrosslora.checkpoint.layout import Module, StoredExperts, expected_shapes, layout_of
from jcrosslora.checkpoint.store import TensorStore
from jcrosslora.checkpoint.vocabulary import Vocabulary, read_tokenizer
from jcrosslora.checkpoint.wrapped import TEXT, Wrapper
from jcrosslora.errors import CheckpointError
from jcrosslora.utils.cache import open_cache
from jcrosslora.utils.digests import Digests, digest_of
from jcrosslora.utils.texts import html_table


@dataclass(frozen=True, eq=False, repr=False)
class BaseModel:
    """A base model whose configuration and shapes have been checked; its arrays are read when used.

    Attributes:
        name: what adapters of this model should name as their base. In this order: the name given to `open_base`; the
            hub id, also if the path lies in a hub cache or a live model was loaded from the hub; for GGUF the source
            repository in its metadata, then `general.name`; else the path. Neither `_name_or_path` in config.json nor
            `general.base_model` of a GGUF is used: in a fine-tuned model they name the model that it was trained from.
        ref: the argument of `open_base`; for a base in memory its name.
        path: the folder or the GGUF file, None for a base in memory.
        tokenizer_path: the folder of tokenizer.json or the GGUF file, None for a base in memory without a tokenizer.
        revision: commit of a hub model, else None.
        config: its configuration with Hugging Face keys; for GGUF translated from the metadata.
        modules: every linear module by its Llama-style name: by layer, then q, k, v, o, gate, up, down.
        fused: module as the model stores it -> ((logical name, first row, last row exclusive), ...).
        chat_template: Jinja template given instead of the base's own, else None.
        wrapper: the multimodal class around this text model; None for a text-only model.
        notes: where the files contradict the configuration or hold more than the model, one sentence each.
    """

    name: str
    ref: str
    path: Path | None
    tokenizer_path: Path | None
    revision: str | None
    family: Family
    config: Mapping[str, Any]
    dims: Dims
    modules: Mapping[str, Module]
    fused: Mapping[str, tuple[tuple[str, int, int], ...]]
    store: TensorStore
    chat_template: str | None = None
    wrapper: Wrapper | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        facts = f"{self.family.name}, {self.dims.layers} layers, width {self.dims.hidden}"
        return f"BaseModel({self.name!r}, {facts}, {self._size} parameters, {self._storage})"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        dims = self.dims
        row = {
            "family": self.family.name,
            "layers": str(dims.layers),
            "width": str(dims.hidden),
            "MLP width": str(dims.intermediate),
            "heads": f"{dims.heads} ({dims.kv_heads} key-value) of {dims.head_dim}",
            "vocabulary": f"{dims.vocab:,}",
            "parameters": self._size,
            "stored as": self._storage,
        }
        return html_table([row | ({"revision": self.revision} if self.revision else {})], self.name)

    @property
    def _size(self) -> str:
        count = sum(map(prod, self.tensor_shapes().values()))
        if count >= 1e9:
            return f"{count / 1e9:.2f}B"
        return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"

    @property
    def _storage(self) -> str:
        """Dtypes of the modules, the most frequent first."""
        return ", ".join(dtype for dtype, _ in Counter(module.dtype for module in self.modules.values()).most_common())

    @property
    def prefix(self) -> str:
        """The prefix of module names in the model's class; see `class_module_name`."""
        return TEXT if self.wrapper is None else self.wrapper.prefix

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        return self.family.is_tied(self.config)

    @cached_property
    def architecture(self) -> Architecture:
        """The layers and the facts derived from them."""
        return Architecture(self.family, self.config, self.dims)

    def layers_with(self, name: str) -> tuple[int, ...]:
        """Return the layers that have a role, norm or tensor of this name."""
        return layers_with(self.architecture.stack, name)

    @property
    def has_experts(self) -> bool:
        """Whether a layer has experts."""
        return bool(self.layers_with("router"))

    @cached_property
    def expert_layout(self) -> Mapping[str, str] | None:
        """Name -> path of the tensors of experts, see `ExpertRules.layouts`; None for a family without experts."""
        return layout_of(self.family, self.store.names)

    @cached_property
    def experts(self) -> StoredExperts:
        """The experts of a family that has them."""
        rules, layout = self.family.experts, self.expert_layout
        assert rules is not None
        assert layout is not None
        return StoredExperts(rules, layout, rules.block(self.config, self.dims.hidden), self.store)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every tensor that the model must have."""
        return expected_shapes(self.architecture, self.expert_layout)

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor by its Hugging Face name; the head of a tied model is the embedding.

        Returns:
            A read-only view in the stored dtype; float32 for a quantised tensor. Matrices are (out, in).

        Raises:
            CheckpointError: no such tensor, or a dtype that cannot be read.
        """
        return self.store.tensor(self._stored_name(name))

    def weight(self, module_name: str) -> np.ndarray:
        """Read the weight (O, I) of a logical module, see `tensor`."""
        module = self._module(module_name)
        array = self.store.tensor(module.tensor)
        return array if module.rows is None else array[slice(*module.rows)]

    def stored_weight(self, name: str) -> np.ndarray:
        """Read the weight (O, I) of a logical module, or of a fused module as a whole; see `tensor`."""
        return self.weight(name) if name in self.modules else self.tensor(f"{name}.weight")

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Read only the given rows of a matrix, e.g. of the embedding, as float32 (n, columns).

        In a stack of matrices, row ids (n,) are numbered through all of them.

        Raises CheckpointError if there is no such tensor, it is not a matrix, or does not have a row.
        """
        stored, ids = self._stored_name(name), np.asarray(ids)
        shape = self.store.shape(stored)
        inside = ids.size == 0 or 0 <= int(ids.min()) <= int(ids.max()) < prod(shape[:-1])
        if len(shape) < 2 or ids.ndim != 1 or not inside:
            msg = f"{self.ref}: rows of {name!r} with shape {list(shape)} were asked for that it does not have"
            raise CheckpointError(msg)
        return self.store.rows(stored, ids.astype(np.int64))

    def bias(self, module_name: str) -> np.ndarray | None:
        """Read the bias (O,) of a logical module, None if it has none; see `tensor`."""
        module = self._module(module_name)
        if module.role not in self.family.biased_roles(self.config):
            return None
        array = self.store.tensor(f"{module.tensor.removesuffix('.weight')}.bias")
        return array if module.rows is None else array[slice(*module.rows)]

    def residual_gain(self, module_name: str) -> np.ndarray:
        """Return the gain, float32 (hidden,), between the residual stream and a module.

        A module that reads the stream has the gain of the norm before it, with Gemma's 1 + weight already summed. One
        that writes to it has the gain of the norm after it, times Granite's residual factor, and times a half for
        shared experts that are averaged with the others. Both are multiplied by the family's factor on the module's
        input or output. Without a norm the gain is ones, times these factors.
        """
        module = self._module(module_name)
        norm = self.architecture.stream_norm(module.role, module.layer)
        if module.role in WRITERS:
            numbers = self.family.residual_scale, self.family.output_factors.get(module.role)
        else:
            numbers = (self.family.input_factors.get(module.role),)
        stated = (read_number(self.config, number, self.ref) for number in numbers if number is not None)
        factor = np.float32(prod(stated))
        if module.role == "shared_down_proj" and self.family.experts and self.family.experts.averages(self.config):
            factor *= np.float32(0.5)
        if norm is None:
            return np.full(self.dims.hidden, factor)
        weight = self.tensor(f"model.layers.{module.layer}.{norm}.weight").astype(np.float32)
        with np.errstate(invalid="ignore"):  # Callers check for NaN.
            return (weight + np.float32(self.family.gain_offset)) * factor

    def vocabulary(self) -> Vocabulary:
        """Return the normal tokens as bytes, or why they cannot be read."""
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        own = getattr(self.store, "vocabulary", None)
        return own() if own is not None else read_tokenizer(self.tokenizer_path, self.dims.vocab)

    def digest(self, digests: Digests | None = None) -> str:
        """Return the identity of the weights: "sha256:" and a hex digest, computed once.

        For one weight file it is its SHA-256; for several, the SHA-256 of their hex digests, one per line in index
        order. For weights in memory it covers names, dtypes, shapes and numbers, and differs from their file's digest.
        Files whose digest is in `digests` are not read.
        """
        if "_digest" not in self.__dict__:
            read = self.store.sha256s
            parts = digests(self.store.files, read) if digests is not None and self.store.files else read()
            joined = "\n".join(parts).encode()
            # A cached_property takes no argument, and assignment to an attribute of a frozen dataclass is refused.
            self.__dict__["_digest"] = parts[0] if len(parts) == 1 else hashlib.sha256(joined).hexdigest()
        return f"sha256:{self.__dict__['_digest']}"

    def release(self) -> None:
        """Give the resident pages of the memory maps back to the system; arrays stay valid."""
        self.store.release()

    def _module(self, name: str) -> Module:
        if name not in self.modules:
            raise CheckpointError(f"{self.ref}: has no module {name!r}")
        return self.modules[name]

    def _stored_name(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self.tied else name


@dataclass(frozen=True)
class BaseInfo:
    """Facts about a base model, without its weights. Hashable, so that it can be static under jit.

    Attributes:
        name: as written into `base_model_name_or_path`.
        ref: the path or hub id that was opened.
        digest: "sha256:..." of the weight files; "" if it was not computed.
        shapes: (O, I) of every module, by name, in the order of the model.
        fused: fused matrices, see `BaseModel.fused`.
        heads: number of query heads, and of key-value heads.
        prefix: see `BaseModel.prefix`.
    """

    name: str
    ref: str
    revision: str | None
    digest: str
    family: str
    shapes: Mapping[str, tuple[int, int]] = field(hash=False)
    fused: Mapping[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict, hash=False)
    heads: tuple[int, int] | None = None
    has_experts: bool = False
    prefix: str = TEXT


def describe_base(base: BaseModel, *, digest: str | None = None) -> BaseInfo:
    """Return the `BaseInfo` of a base.

    `digest` is the digest of its weights, or "" to leave it out; None reads the weight files once.
    """
    return BaseInfo(
        name=base.name,
        ref=base.ref,
        revision=base.revision,
        digest=base.digest() if digest is None else digest,
        family=base.family.name,
        shapes={name: module.shape for name, module in base.modules.items()},
        fused=base.fused,
        heads=(base.dims.heads, base.dims.kv_heads),
        has_experts=base.has_experts,
        prefix=base.prefix,
    )


def finite(base: BaseModel, name: str, array: np.ndarray) -> np.ndarray:
    """Return a weight as float32; raise CheckpointError if it holds NaN or infinity."""
    if not np.isfinite(array := array.astype(np.float32, copy=False)).all():
        raise damaged(base, name)
    return array


def damaged(base: BaseModel, name: str) -> CheckpointError:
    """Return the error for a weight that is not finite."""
    msg = f"{base.ref}: the weight of {name} holds NaN or infinity; the file is damaged, download it again"
    return CheckpointError(msg)


def base_digest(base: BaseModel) -> str:
    """Return `BaseModel.digest`; unchanged files are not read again."""
    cache = open_cache()
    return base.digest(None if cache is None else cache.digests)


_LITTLE = 1 << 30  # bytes; takes about two seconds to hash


def quick_digest(base: BaseModel) -> str | None:
    """Return `base_digest` if it is known or the files are small; None for other files and for weights in memory."""
    files, cache = base.store.files, open_cache()
    recorded = cache is not None and cache.digests.known(files) is not None
    small = sum(path.stat().st_size for path in files) <= _LITTLE
    return base_digest(base) if files and (recorded or small or "_digest" in base.__dict__) else None


# Keys of a configuration that say where it came from.
_PROVENANCE = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})


def weights_key(base: BaseModel, digests: Digests | None = None) -> str:
    """Return the cache key of a base's weights and how its modules are read."""
    config = {name: value for name, value in base.config.items() if name not in _PROVENANCE}
    modules = [[name, module.shape, module.tensor, module.rows] for name, module in base.modules.items()]
    return digest_of(base.digest(digests), base.family.name, config, modules)
