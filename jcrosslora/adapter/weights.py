"""An adapter file of any format as PEFT would have written it: its configuration and the names of its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jcrosslora.checkpoint.mapped import MappedFile
from jcrosslora.checkpoint.safetensors import Entry
from jcrosslora.errors import AdapterError

_NAME_LIMIT = 512  # of a tensor's name, which patterns are matched against; real ones have less than 150 characters


class Weights(Protocol):
    """Tensors by the names that PEFT gives them, read on demand; a safetensors file of PEFT is one."""

    @property
    def file(self) -> MappedFile:
        """Where they lie."""
        ...

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Dtype and shape of each, as PEFT would store it."""
        ...

    def array(self, name: str) -> np.ndarray:
        """The tensor, as PEFT would store it.

        Raises:
            CheckpointError: it cannot be read.
        """
        ...


@dataclass(frozen=True, eq=False)
class Translated:
    """Tensors of another format as PEFT would store them.

    Attributes:
        file: where they lie.
        entries: what PEFT would have in its header.
        read: the tensor of a name.
    """

    file: MappedFile
    entries: Mapping[str, Entry]
    read: Callable[[str], np.ndarray]

    def array(self, name: str) -> np.ndarray:
        """See `Weights`."""
        return self.read(name)


@dataclass(frozen=True, eq=False)
class Opened:
    """An adapter whose headers have been read.

    Attributes:
        config: `adapter_config.json` as PEFT would have it.
        weights: its tensors.
        stated: the configuration that is in the files, whatever the format.
        notes: what of it is not read, one sentence each.
    """

    config: Mapping[str, Any]
    weights: Weights
    stated: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def check_names(file: MappedFile, names: Mapping[str, object]) -> None:
    """Refuse a file with absurdly long names.

    Raises:
        AdapterError: there is one.
    """
    if (longest := max(map(len, names), default=0)) > _NAME_LIMIT:
        msg = f"{file.path}: a tensor's name has {longest} characters, at most {_NAME_LIMIT} are read"
        raise AdapterError(msg + ": the file is damaged")
