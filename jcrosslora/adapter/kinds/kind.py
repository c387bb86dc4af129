"""The record of a kind of adapter: how it is recognised, and how its file becomes updates."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds.adapter_file import AdapterFile

Config = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one module.

    Attributes:
        factors: a (K, I), b (O, K).
        lost: squared Frobenius norm of what the factors leave out of the true update; 0 if they are exact.
    """

    factors: LoRAFactors
    lost: float = 0.0


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        name: as its users know it.
        peft_type: `peft_type` of its configuration, in capitals.
        formula: its update dW, in a few words.
        read: yields (module as the file spells it, its update) for each module of an opened file.
        check: refuses a configuration that cannot be computed with; arguments are the configuration and its path.
        applies: whether a configuration and the parts in its file (see `parse_tensor_name`) are of this kind; only
            called if `peft_type` is this one.
        over: names of kinds that it may be combined with.
        remark: what a user should know of how it was read, "" if nothing.
    """

    name: str
    peft_type: str
    formula: str
    read: Callable[[AdapterFile], Iterator[tuple[str, Update]]]
    check: Callable[[Config, str], None]
    applies: Callable[[Config, Collection[str]], bool] = lambda *_: True
    over: tuple[str, ...] = ()
    remark: str = ""


def each_module(
    read: Callable[[AdapterFile, str], Update | None],
) -> Callable[[AdapterFile], Iterator[tuple[str, Update]]]:
    """Make a reader of whole files from a reader of one module, which returns None for a module without an update."""

    def read_all(file: AdapterFile) -> Iterator[tuple[str, Update]]:
        for module in file.modules:
            update = read(file, module)
            if update is not None:
                yield module, update

    return read_all
