"""Group the tensors of an adapter file: parts of linear layers' updates, shared parts, and others."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jcrosslora.adapter.expert_names import is_of_experts, is_router
from jcrosslora.adapter.kinds.config_tables import REFUSED_TENSORS
from jcrosslora.adapter.names import TensorName, natural_key
from jcrosslora.checkpoint.family.names import LAYER_EMBEDDING, LAYER_INPUT_PROJECTION
from jcrosslora.checkpoint.wrapped import is_other_part, text_module_name
from jcrosslora.errors import AdapterError

Parts = Mapping[str, Mapping[str, str]]

_EXTRAS = frozenset({"embedding", "lora_bias", "tokens", "bias", "full"})
OTHER_PART = "other part"


@dataclass(frozen=True)
class TensorGroups:
    """The tensors of an adapter file by purpose.

    Attributes:
        modules: module, as the file spells it and in natural order, to its parts: part to the tensor's name.
        heads: the same of the output head.
        shared: parts that all modules share, to the tensor's name.
        extras: tensors that are not part of the update of a linear layer of the text model, by kind ("embedding",
            "bias", ...); `OTHER_PART` for all tensors of a vision tower and the like.
    """

    modules: Parts
    heads: Parts
    shared: Mapping[str, str]
    extras: Mapping[str, Sequence[TensorName]]

    @property
    def parts(self) -> frozenset[str]:
        """Every part that a module has, or that all share."""
        return frozenset(
            part for parts in (*self.modules.values(), *self.heads.values(), self.shared) for part in parts
        )


def group_tensors(tensors: Sequence[TensorName], path: Path) -> TensorGroups:
    """Group the tensors of a file by purpose.

    Raises:
        AdapterError: a tensor belongs to a kind of adapter that is refused (named).
    """
    _refuse_tensors(tensors, path)
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    heads: dict[str, dict[str, str]] = defaultdict(dict)
    extras: dict[str, list[TensorName]] = defaultdict(list)
    for tensor in tensors:
        if is_other_part(tensor.module):
            extras[OTHER_PART].append(tensor)
        elif f"{text_module_name(tensor.module)}.weight" in (LAYER_EMBEDDING, LAYER_INPUT_PROJECTION):
            extras["layer inputs"].append(tensor)
        elif is_of_experts(tensor.module) or is_router(tensor.module):
            extras["experts" if is_of_experts(tensor.module) else "router"].append(tensor)
        elif tensor.kind in _EXTRAS:
            extras[tensor.kind].append(tensor)
        elif tensor.module and tensor.kind != "copy":
            group = heads if text_module_name(tensor.module) == "lm_head" else modules
            group[tensor.module][tensor.kind] = tensor.key
    # The magnitudes of a DoRA of an embedding belong to the embedding.
    for tensor in extras["embedding"]:
        modules.pop(tensor.module, None)
    return TensorGroups(
        modules=dict(sorted(modules.items(), key=lambda item: natural_key(item[0]))),
        heads=heads,
        shared={tensor.kind: tensor.key for tensor in tensors if not tensor.module},
        extras={kind: found for kind, found in extras.items() if found},
    )


def _refuse_tensors(tensors: Sequence[TensorName], path: Path) -> None:
    for tensor in tensors:
        if tensor.kind in REFUSED_TENSORS:
            msg = f"{path}: tensor {tensor.key!r} is of a kind that is not supported, {REFUSED_TENSORS[tensor.kind]}"
            raise AdapterError(msg)
        if tensor.kind in ("A", "B") and tensor.module.endswith(".base_layer") and not is_of_experts(tensor.module):
            msg = f"{path}: tensor {tensor.key!r} is a LoRA of parameters (target_parameters) that are not experts', "
            msg += "which is not supported; train an adapter of linear layers instead"
            raise AdapterError(msg)
