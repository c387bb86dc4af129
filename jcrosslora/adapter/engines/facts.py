"""Read what is known of an adapter of any kind and format without its tensors: configuration, names, shapes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jcrosslora.adapter.config import check_numbers
from jcrosslora.adapter.folder import CONFIG, PICKLE, WEIGHTS, Form, find_adapter, form_of, open_weights, read_config
from jcrosslora.adapter.kinds.config_tables import PARAMETERS, VARIANTS
from jcrosslora.adapter.names import TensorName, parse_tensor_name
from jcrosslora.adapter.patterns import module_rank, module_scale
from jcrosslora.adapter.read_gguf import open_gguf_adapter, parse_gguf_name
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import AdapterError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter as the engine rules see it.

    Attributes:
        config: its `adapter_config.json`, or the metadata of a GGUF file.
        shapes: tensor name to shape; empty if the weights are a pickle.
        tensors: the same names, parsed; empty for MLX.
        pickle: whether the weights are `adapter_model.bin`.
        form: the format of the files.
        family: the base's family ("llama", "qwen2", ...), None if it is not known.
        tied: whether the base's output head is its embedding, None if it is not known.
        base: the base that it is for, if it was given.
        faults: errors in the numbers of the configuration or in the shapes, for any engine.
    """

    config: Mapping[str, Any]
    shapes: Shapes = field(default_factory=dict)
    tensors: tuple[TensorName, ...] = ()
    pickle: bool = False
    form: Form = "PEFT"
    family: str | None = None
    tied: bool | None = None
    base: BaseModel | None = None
    faults: tuple[str, ...] = ()

    @property
    def peft_type(self) -> str:
        """The type in capitals, "" if there is none."""
        return str(self.config.get("peft_type") or "").upper()

    def factors(self, side: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the A or B of each module; the first number of A is the rank."""
        return {tensor.module: self.shapes[tensor.key] for tensor in self.tensors if tensor.kind == side}

    def scales(self) -> dict[str, float]:
        """Return the scale that PEFT gives to each module; only defined without faults."""
        return {module: module_scale(self.config, module, shape[0]) for module, shape in self.factors("A").items()}


def read_facts(
    path: Path, family: str | None = None, tied: bool | None = None, base: BaseModel | None = None
) -> AdapterFacts:
    """Read the facts of an adapter: a folder, or a file of llama.cpp.

    Args:
        path: of the adapter.
        family: see `AdapterFacts`.
        tied: see `AdapterFacts`.
        base: see `AdapterFacts`; it gives its family, and whether it is tied.

    Raises:
        AdapterError: not an adapter, or a file of it cannot be read.
    """
    family, tied = (family, tied) if base is None else (base.family.name, base.tied)
    if (path / PICKLE).is_file() and (path / CONFIG).is_file() and not (path / WEIGHTS).is_file():
        config = read_config(path / CONFIG)
        if form_of(config) == "PEFT":
            return AdapterFacts(config, pickle=True, family=family, tied=tied, faults=_number_faults(config))
    files = find_adapter(path)
    if files.config is None:
        return dataclasses.replace(_gguf_facts(files.weights, family, tied), base=base)
    config = read_config(files.config)
    shapes = {key: entry.shape for key, entry in open_weights(files.weights).entries.items()}
    if files.form == "MLX":
        return AdapterFacts(config, shapes, form="MLX", family=family, tied=tied, base=base)
    tensors = tuple(parse_tensor_name(key) for key in shapes)
    faults = _number_faults(config) or _tensor_faults(config, shapes, tensors)
    return AdapterFacts(config, shapes, tensors, family=family, tied=tied, base=base, faults=faults)


def _gguf_facts(path: Path, family: str | None, tied: bool | None) -> AdapterFacts:
    header = open_gguf_adapter(path).header
    shapes = {name: info.shape for name, info in header.tensors.items()}
    tensors = tuple(parse_gguf_name(name) for name in shapes)
    faults = _pair_faults(shapes, tensors)
    return AdapterFacts(header.metadata, shapes, tensors, form="GGUF", family=family, tied=tied, faults=faults)


def _is_lora(config: Mapping[str, Any]) -> bool:
    return str(config.get("peft_type")).upper() == "LORA"


def _number_faults(config: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        if _is_lora(config):
            check_numbers(config, CONFIG)
    except AdapterError as error:
        return (str(error),)
    return ()


def _tensor_faults(config: Mapping[str, Any], shapes: Shapes, tensors: tuple[TensorName, ...]) -> tuple[str, ...]:
    # The factors of expert parameters hold all experts at once, with axes of their own.
    if not _is_lora(config) or VARIANTS[PARAMETERS](config):
        return ()
    if faults := _pair_faults(shapes, tensors):
        return faults
    ranks = {t.module: shapes[t.key][0] for t in tensors if t.kind == "A"}
    wrong = sorted(module for module, rank in ranks.items() if rank != module_rank(config, module))
    if wrong:
        rank, wanted = ranks[wrong[0]], module_rank(config, wrong[0])
        return (f"{wrong[0]} has rank {rank}, {CONFIG} says {wanted} ({len(wrong)} such modules)",)
    return ()


def _pair_faults(shapes: Shapes, tensors: tuple[TensorName, ...]) -> tuple[str, ...]:
    a, b = ({t.module: shapes[t.key] for t in tensors if t.kind == side} for side in "AB")
    alone = sorted(a.keys() ^ b.keys())
    differ = sorted(module for module in a.keys() & b.keys() if not _is_pair(a[module], b[module]))
    if alone:
        return (f"{alone[0]} has only one of lora_A and lora_B ({len(alone)} such modules)",)
    if differ:
        return (f"lora_A and lora_B of {differ[0]} have different ranks ({len(differ)} such modules)",)
    return ()


def _is_pair(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) >= 2 and len(a) == len(b) and a[0] == b[1] and a[0] > 0
