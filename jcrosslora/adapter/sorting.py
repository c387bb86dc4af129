"""What the tensors of an adapter file are for: parts of linear layers' updates, what all share, and others."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jcrosslora.adapter.kinds.refused import REFUSED_TENSORS
from jcrosslora.adapter.names import TensorName, natural_key, text_module_name
from jcrosslora.errors import AdapterError

Parts = Mapping[str, Mapping[str, str]]

_DROPPED = frozenset({"embedding", "lora_bias", "tokens", "bias", "full"})


@dataclass(frozen=True)
class Contents:
    """The tensors of an adapter file, sorted.

    Attributes:
        modules: module, as the file spells it, in natural order, to part to the tensor's name in the file.
        heads: the same of the output head.
        shared: what all modules share: part to the tensor's name.
        dropped: what is no part of an update of a linear layer, by sort ("embedding", "bias", ...).
    """

    modules: Parts
    heads: Parts
    shared: Mapping[str, str]
    dropped: Mapping[str, Sequence[TensorName]]

    @property
    def parts(self) -> frozenset[str]:
        """Every part that a module has, or that all share."""
        return frozenset(
            part for parts in (*self.modules.values(), *self.heads.values(), self.shared) for part in parts
        )


def sort_tensors(tensors: Sequence[TensorName], path: Path) -> Contents:
    """Sort the tensors of a file by what they are for.

    Raises:
        AdapterError: a tensor of a kind that is refused (named).
    """
    _refuse_tensors(tensors, path)
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    heads: dict[str, dict[str, str]] = defaultdict(dict)
    dropped: dict[str, list[TensorName]] = defaultdict(list)
    for tensor in tensors:
        if tensor.kind in _DROPPED:
            dropped[tensor.kind].append(tensor)
        elif tensor.module and tensor.kind != "copy":
            (heads if text_module_name(tensor.module) == "lm_head" else modules)[tensor.module][tensor.kind] = (
                tensor.key
            )
    # The magnitudes of an embedding (DoRA) go with it.
    for tensor in dropped["embedding"]:
        modules.pop(tensor.module, None)
    return Contents(
        modules=dict(sorted(modules.items(), key=lambda item: natural_key(item[0]))),
        heads=heads,
        shared={tensor.kind: tensor.key for tensor in tensors if not tensor.module},
        dropped={sort: found for sort, found in dropped.items() if found},
    )


def _refuse_tensors(tensors: Sequence[TensorName], path: Path) -> None:
    for tensor in tensors:
        if tensor.kind in REFUSED_TENSORS:
            msg = f"{path}: tensor {tensor.key!r} is of a kind that is not supported, {REFUSED_TENSORS[tensor.kind]}"
            raise AdapterError(msg)
        if tensor.kind in ("A", "B") and tensor.module.endswith(".base_layer"):
            msg = f"{path}: tensor {tensor.key!r} is a LoRA of expert parameters (target_parameters), not supported"
            msg += "; train an adapter of linear layers instead"
            raise AdapterError(msg)
