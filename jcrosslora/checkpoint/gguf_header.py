"""The header of a GGUF file: metadata with checked types, and tensor offsets, checked against the file's size.

The reader of the gguf package is not used: it keeps an array object for every string of the vocabulary (7.5 s and
0.7 GB for Gemma's 262,144 tokens) and does not check lengths. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from jcrosslora.architectures import FAMILIES, Family
from jcrosslora.checkpoint.store import MappedFile, is_array_shape

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4  # GGML_MAX_DIMS
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DEFAULT_ALIGNMENT = 32
_LENGTH = struct.Struct("<Q")
# general.architecture -> model_type. Of families with one architecture, which have the same modules, it is the first:
# "llama" for Mistral too, and "olmo2" for OLMo 3.
ARCHITECTURES: dict[str, str] = {}
for _family in FAMILIES.values():
    for _architecture in () if _family.gguf is None else _family.gguf.architectures:
        ARCHITECTURES.setdefault(_architecture, _family.name)
_WITH_EXPERTS = {
    one.gguf.architectures[-1] for one in FAMILIES.values() if one.gguf is not None and one.experts is not None
}
# Architectures of families that are read from safetensors alone -> why.
_REFUSED = {
    "falcon-h1": "its files hold the factors of the configuration in the weights, and do not state them",
    "phimoe": "llama.cpp weighs the experts otherwise than the class of the model",
    "chatglm": "its files do not state the epsilon of the norms",
}
# `expert_gating_func`: how files number the scores of experts.
_SOFTMAX = 1  # where files of several families state none
_SCORES = {_SOFTMAX: ("softmax",), 2: ("sigmoid", "chosen sigmoid"), 3: ("chosen",)}
_LARGEST = 1e38  # float32 ends at 3.4e38
_HUB_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+?)/?")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file.

    Attributes:
        shape: rows first, as in numpy; the file lists the row length first.
        start: first byte, counted from the start of the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GGUFHeader:
    """The checked header."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


class _Cursor:
    """A reader of the header that checks every length before use."""

    def __init__(self, file: MappedFile):
        self.file = file
        self.position = 0

    def take(self, count: int) -> int:
        """Advance by `count` bytes and return their start."""
        start = self.position
        if count > self.file.size - start:
            self.file.refuse(f"the GGUF header ends beyond the file ({self.file.size} bytes): download it again")
        self.position += count
        return start

    def number(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self.file.buffer, self.take(layout.size))[0]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.strings(1)[0]
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if kind not in _SCALARS:
            self.file.refuse(f"metadata has a value of unknown type {kind}: the file is corrupt, download it again")
        return self.number(_SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
            start = self.take(count * dtype.itemsize)
            return self.file.array(dtype, (count,), start).tolist()
        if kind != _STRING:
            self.file.refuse(f"metadata has an array of unsupported type {kind}: convert the model again")
        return self.strings(count)

    def strings(self, count: int) -> list[str]:
        """Read strings in a loop without calls: a vocabulary has hundreds of thousands.

        A token that is not valid UTF-8 matches no text, but the model stays readable.
        """
        self._ensure(count * _LENGTH.size)
        buffer, size, unpack, found = self.file.buffer, self.file.size, _LENGTH.unpack_from, []
        position = self.position
        for _ in range(count):
            start = position + _LENGTH.size
            end = start + unpack(buffer, position)[0] if start <= size else start
            if end > size:
                self.position = position
                self.take(end - position)  # raises the error
            found.append(buffer[start:end].decode("utf-8", "replace"))
            position = end
        self.position = position
        return found

    def repeat(self, count: int, smallest: int, read: Callable[[], Any]) -> list[Any]:
        """Call `read` `count` times, after a check that as many items of `smallest` bytes fit into the file."""
        self._ensure(count * smallest)
        return [read() for _ in range(count)]

    def _ensure(self, count: int) -> None:
        start = self.position
        self.take(count)
        self.position = start


def read_header(file: MappedFile, sizes: Mapping[int, tuple[int, int]]) -> GGUFHeader:
    """Read and check the header.

    `sizes` maps the number of a ggml type to (elements of a block, bytes of a block).

    Raises CheckpointError if it is no GGUF file, of another version, truncated, or a tensor is outside the file.
    """
    cursor = _Cursor(file)
    _check_start(cursor)
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    pairs = cursor.repeat(key_count, 13, lambda: (cursor.strings(1)[0], cursor.value(cursor.number("I"))))
    infos = cursor.repeat(tensor_count, 24, lambda: _tensor_info(cursor))
    metadata = _unique(pairs, file)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0:
        file.refuse(f"general.alignment is {alignment!r}: the file is corrupt, download it again")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: TensorInfo(info.shape, info.kind, data_start + info.start) for name, info in _unique(infos, file).items()
    }
    for name, info in tensors.items():
        _check_extent(file, name, info, sizes)
    return GGUFHeader(metadata, tensors)


def _unique(pairs: list[tuple[str, Any]], file: MappedFile) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        file.refuse("a name occurs twice in the GGUF header: the file is corrupt, download it again")
    return result


def _check_start(cursor: _Cursor) -> None:
    file, start = cursor.file, cursor.take(8)
    magic, version = struct.unpack_from("<4sI", file.buffer, start)
    if magic != _MAGIC:
        file.refuse(f"not a GGUF file (it starts with {magic!r}): download it again")
    if version not in _VERSIONS:
        file.refuse(f"GGUF version {version} is not supported (2 and 3, little-endian, are): convert the model again")


def _tensor_info(cursor: _Cursor) -> tuple[str, TensorInfo]:
    (name,) = cursor.strings(1)
    count = cursor.number("I")
    if count > _MAX_DIMS:
        cursor.file.refuse(f"tensor {name!r} has {count} dimensions: the file is corrupt, download it again")
    dims = [cursor.number("Q") for _ in range(count)]
    kind, offset = cursor.number("I"), cursor.number("Q")
    return name, TensorInfo(tuple(reversed(dims)), kind, offset)


def _check_extent(file: MappedFile, name: str, info: TensorInfo, sizes: Mapping[int, tuple[int, int]]) -> None:
    if info.kind not in sizes:
        what = f"tensor {name!r} has ggml type {info.kind}, which the installed gguf package does not know: update it "
        file.refuse(what + "(pip install -U gguf) or use another quantisation")
    elements, size = sizes[info.kind]
    if info.shape and info.shape[-1] % elements:
        file.refuse(f"rows of tensor {name!r} are not whole blocks: the file is corrupt, download it again")
    file.check_extent(name, info.start + prod(info.shape) // elements * size)
    if not is_array_shape(info.shape):
        file.refuse(f"tensor {name!r} has shape {list(info.shape)}, which no memory holds: download it again")


class Metadata:
    """The metadata of a GGUF file, with keys relative to its architecture.

    Raises:
        CheckpointError: an architecture that is not supported, a file that is not a complete base model, or a value
            of another type.
    """

    def __init__(self, values: Mapping[str, Any], file: MappedFile):
        self.values, self.file = values, file
        arch = values.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            reason = _REFUSED.get(arch) if isinstance(arch, str) else None
            why = "" if reason is None else f": {reason}: use the safetensors of the model"
            file.refuse(f"GGUF architecture {arch!r} is not supported{why}; supported: {', '.join(ARCHITECTURES)}")
        self.arch = arch
        if values.get("general.type", "model") != "model":
            file.refuse(f"is a GGUF of type {values['general.type']!r}, where a base model was expected")
        if values.get("split.count", 1) not in (0, 1):
            file.refuse(f"is one of {values['split.count']} parts: join them with llama-gguf-split --merge")
        if (count := self.get("expert_count")) and arch not in _WITH_EXPERTS:
            file.refuse(f"experts are not supported for architecture {arch!r} (expert_count {count})")

    @cached_property
    def family(self) -> Family:
        """The family; if several share the architecture, the one that fits the file: windows, experts, scores."""
        known = [(one, one.gguf) for one in FAMILIES.values() if one.gguf is not None]
        same = [one for one, form in known if self.arch in form.architectures and not form.read_as_other]
        expert = bool(self.count("expert_count"))
        same = [one for one in same if (one.experts is not None) == expert] or same
        same = [one for one in same if one.experts is not None and one.experts.scores in self.scores] or same
        windowed = bool(self.count("attention.sliding_window"))
        return next((one for one in same if (one.windows is not None) == windowed), same[0])

    @property
    def scores(self) -> tuple[str, ...]:
        """How experts may score, see `ExpertRules.scores`; nothing for scores that no family has."""
        stated = self.get("expert_gating_func", _SOFTMAX)
        return _SCORES.get(stated, ()) if type(stated) is int else ()

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `<architecture>.<key>`."""
        return self.values.get(f"{self.arch}.{key}", default)

    def number(self, key: str) -> float | None:
        """Return a positive number, as the shortest decimal of the stored float32 (1e-05, not 9.99999975e-06)."""
        value = self.get(key)
        if value is None:
            return None
        # The bound also excludes infinity and NaN.
        if type(value) not in (int, float) or not 0 < value < _LARGEST:
            self.file.refuse(f"{self.arch}.{key} is {str(value)[:60]!r}, expected a positive number")
        return float(str(np.float32(value)))

    def count(self, key: str) -> int | None:
        """Return a non-negative integer of 32 bits."""
        value = self.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
            self.file.refuse(f"{self.arch}.{key} is {str(value)[:60]!r}, expected one non-negative integer")
        return value

    def most(self, key: str) -> int | None:
        """Return a non-negative integer, or the largest of a list with one for each layer."""
        value = self.get(key)
        if not isinstance(value, list):
            return self.count(key)
        if not value or not all(type(one) is int and 0 <= one < 1 << 31 for one in value):
            self.file.refuse(f"{self.arch}.{key} is {str(value)[:60]}, expected an integer for each layer")
        return max(value)

    def layers(self) -> int | None:
        """Return the number of layers, without those after the last that predict further tokens."""
        blocks, further = self.count("block_count"), self.count("nextn_predict_layers") or 0
        return blocks if blocks is None else max(blocks - further, 0)

    def own(self) -> dict[str, Any]:
        """Return the values of the architecture, by their keys without it."""
        first = f"{self.arch}."
        return {key.removeprefix(first): value for key, value in self.values.items() if key.startswith(first)}

    def head_dim(self) -> int:
        """Return the features of a head, 0 if the metadata do not state them."""
        return self.count("attention.key_length") or (self.count("embedding_length") or 0) // (
            self.count("attention.head_count") or 1
        )


def model_name(values: Mapping[str, Any]) -> str | None:
    """Return the hub id of the source repository if the metadata state one, else `general.name`."""
    for key in ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url"):
        if (hub_id := hub_id_of(values.get(key))) is not None:
            return hub_id
    name = values.get("general.name")
    return name if isinstance(name, str) and name else None


def hub_id_of(stated: Any) -> str | None:
    """Return the hub id in a value that is a hub id or the address of a repository on the hub, else None."""
    if not isinstance(stated, str):
        return None
    if match := _HUB_URL.fullmatch(stated):
        return match[1]
    return stated if re.fullmatch(r"[\w.-]+/[\w.-]+", stated) else None
