"""The input of a kind's reader: the configuration, the tensors by module and part, and the base if given."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter.weights import Weights
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.wrapped import text_module_name
from jcrosslora.errors import AdapterError, CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("U8", "I16", "I32", "I64")
_HEAD = "lm_head"
# Largest number of elements in the factors of one module: 2 GB in float64.
LARGEST = 2**28
# Names in files of the parts that have other names here.
_TENSORS = {"A": "lora_A", "B": "lora_B", "dora": "lora_magnitude_vector", "latent": "default_lora_latent_mapping"}


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter with its tensors grouped.

    Attributes:
        config: its `adapter_config.json`, or the equivalent of PEFT.
        file: its weights, by PEFT's names.
        modules: module, as the file spells it, to part (see `parse_tensor_name`) to the tensor's name in the file.
        others: the same of modules that are not read (the output head), but may determine what all modules share.
        shared: parts that all modules share, to the tensor's name.
        base: the model that the adapter was trained on, or None.
        rank: the largest rank to read an update at, or None.
    """

    config: Mapping[str, Any]
    file: Weights
    modules: Mapping[str, Mapping[str, str]]
    others: Mapping[str, Mapping[str, str]]
    shared: Mapping[str, str]
    base: BaseModel | None
    rank: int | None

    @property
    def path(self) -> Path:
        """The weights file, or its name in memory, for messages."""
        return self.file.file.path

    def part(self, module: str, part: str, *, axes: int = 2) -> np.ndarray:
        """Read a float tensor of a module, see `read`.

        Raises:
            AdapterError: the module lacks it, or `read` refuses it.
        """
        if part not in self.modules[module]:
            msg = f"{self.path}: module {module!r} has no {_TENSORS.get(part, part)}: the file is incomplete; save or "
            msg += "download it again"
            raise AdapterError(msg)
        return self.read(self.modules[module][part], axes=axes)

    def common(self, part: str, *, axes: int = 2) -> np.ndarray:
        """Read a float tensor that all modules share, see `read`.

        Raises:
            AdapterError: the file lacks it, or `read` refuses it.
        """
        if part not in self.shared:
            msg = f"{self.path}: there is no {part}, which all modules share: save or download the adapter again"
            raise AdapterError(msg)
        return self.read(self.shared[part], axes=axes)

    def read(self, key: str, *, axes: int = 2, dtypes: tuple[str, ...] = FLOATS) -> np.ndarray:
        """Copy a tensor of finite numbers into memory, C-contiguous.

        Args:
            key: its name in the file.
            axes: how many axes it must have, none of them empty.
            dtypes: accepted dtypes.

        Raises:
            AdapterError: another dtype or number of axes, values that are not finite, or a damaged file.
        """
        entry = self.file.entries[key]
        if entry.dtype not in dtypes:
            msg = f"{self.path}: tensor {key!r} has dtype {entry.dtype}, one of {', '.join(dtypes)} was wanted: "
            msg += "convert it"
            raise AdapterError(msg)
        if len(entry.shape) != axes or 0 in entry.shape:
            wanted = {1: "a vector", 2: "a matrix"}.get(axes, f"an array of {axes} axes")
            msg = f"{self.path}: tensor {key!r} has shape {list(entry.shape)}, {wanted} was wanted"
            msg += ": adapters of other layers than linear ones are not supported"
            raise AdapterError(msg)
        try:
            array = np.array(self.file.array(key), order="C")
        except CheckpointError as error:
            raise AdapterError(str(error)) from error
        if not np.isfinite(array).all():
            msg = f"{self.path}: tensor {key!r} holds NaN or infinite values: the adapter is damaged, use another "
            msg += "checkpoint"
            raise AdapterError(msg)
        return array

    def check_size(self, module: str, numbers: int, *, whole: bool = False) -> None:
        """Refuse factors that are far larger than the stored tensors, before they are computed.

        Args:
            module: as the file spells it.
            numbers: elements of both factors.
            whole: whether they are computed at full rank, whatever rank is asked for.

        Raises:
            AdapterError: they would take more than 2 GB.
        """
        if numbers > LARGEST:
            lower = "" if whole else "read it at a lower rank (--adapter-rank), or "
            msg = f"{self.path}: the factors of module {module!r} would hold {numbers:,} numbers: {lower}use another "
            msg += "adapter if no base has such a module"
            raise AdapterError(msg)

    def known_base(self, kind: str, why: str) -> BaseModel:
        """Return the base for a kind that needs it.

        Args:
            kind: its name.
            why: what the base is needed for.

        Raises:
            AdapterError: none was given.
        """
        if self.base is None:
            msg = f"{self.path}: {kind} {why}: the source base is needed; give the base that it was trained on "
            msg += "(`inspect --base`, or the base argument of load_adapter)"
            raise AdapterError(msg)
        return self.base

    def shape(self, module: str, kind: str, why: str) -> tuple[int, int]:
        """Return (O, I) of a module of the base.

        Args:
            module: as the file spells it.
            kind: see `known_base`.
            why: see `known_base`.

        Raises:
            AdapterError: there is no base, or it has no such module.
        """
        base, name = self.known_base(kind, why), text_module_name(module)
        if name in base.modules:
            return base.modules[name].shape
        if name == _HEAD:
            return base.dims.vocab, base.dims.hidden
        if name in base.fused:
            parts = base.fused[name]
            return max(stop for _, _, stop in parts), base.modules[parts[0][0]].shape[1]
        msg = f"{self.path}: module {name!r} is not one of the base {base.name}: give the base it was trained on"
        raise AdapterError(msg)

    def check_shape(self, module: str, shape: tuple[int, int], kind: str, why: str) -> None:
        """Refuse an update that does not fit the base's module.

        Args:
            module: as the file spells it.
            shape: (O, I) of the update.
            kind: see `known_base`.
            why: see `known_base`.

        Raises:
            AdapterError: there is no base, it has no such module, or one of another shape.
        """
        base, wanted = self.known_base(kind, why), self.shape(module, kind, why)
        if wanted != shape:
            msg = f"{self.path}: the update of {text_module_name(module)!r} is {shape[0]} x {shape[1]}, in the base "
            msg += f"{base.name} it is {wanted[0]} x {wanted[1]}: give the base it was trained on"
            raise AdapterError(msg)

    def weight(self, module: str, shape: tuple[int, int], kind: str, why: str) -> np.ndarray:
        """Return the base's weight of a module, float32 (O, I); the arguments are those of `check_shape`.

        Raises:
            AdapterError: see `check_shape`.
        """
        self.check_shape(module, shape, kind, why)
        base, name = self.known_base(kind, why), text_module_name(module)
        try:
            return np.array(base.stored_weight(name), np.float32)
        except CheckpointError as error:
            raise AdapterError(str(error)) from error
