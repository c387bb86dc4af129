"""Read what is known of an adapter of any kind and format without its tensors: configuration, names, shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jcrosslora.adapter.config import PARAMETERS, check_numbers, is_variant
from jcrosslora.adapter.folder import CONFIG, PICKLE, WEIGHTS, Form, find_adapter, form_of, open_weights, read_config
from jcrosslora.adapter.gguf import open_gguf_adapter, parse_gguf_name
from jcrosslora.adapter.names import TensorName, module_rank, module_scale, parse_tensor_name
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import AdapterError


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter as the engine rules see it.

    Attributes:
        config: its `adapter_config.json`, or the metadata of a GGUF file.
        shapes: tensor name to shape; empty if the weights are a pickle.
        tensors: the same names, parsed; empty for MLX.
        pickle: whether the weights are `adapter_model.bin`.
        family: the base's family ("llama", "qwen2", ...), None if it is not known.
        tied: whether the base's output head is its embedding, None if it is not known.
        base: that it is for, if it was given.
        faults: errors in the numbers of the configuration or in the shapes, for any engine.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
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

    def ranks(self) -> dict[str, int]:
        """Return the rank of each module."""
        return {module: shape[0] for module, shape in self.factors("A").items()}

    def scales(self) -> dict[str, float]:
        """Return the scale that PEFT gives to each module; only defined without faults."""
        return {module: module_scale(self.config, module, rank) for module, rank in self.ranks().items()}

    def with_faults(self) -> "AdapterFacts":
        """Look for faults."""
        return replace(self, faults=_number_faults(self) or _tensor_faults(self))


def read_facts(
    path: Path, family: str | None = None, tied: bool | None = None, base: BaseModel | None = None
) -> AdapterFacts:
    """Read the facts of an adapter, a folder or a file of llama.cpp; a base gives its family, and whether it is tied.

    Raises:
        AdapterError: not an adapter, or a file of it cannot be read.
    """
    known: dict[str, Any] = {"family": family, "tied": tied}
    if base is not None:
        known = {"family": base.family.name, "tied": base.tied, "base": base}
    if (path / PICKLE).is_file() and (path / CONFIG).is_file() and not (path / WEIGHTS).is_file():
        config = read_config(path / CONFIG)
        if form_of(config) == "PEFT":
            return AdapterFacts(config, pickle=True, **known).with_faults()
    files = find_adapter(path)
    if files.config is None:
        header = open_gguf_adapter(files.weights).header
        shapes = {name: info.shape for name, info in header.tensors.items()}
        return AdapterFacts(
            header.metadata, shapes, tuple(map(parse_gguf_name, shapes)), form="GGUF", **known
        ).with_faults()
    config = read_config(files.config)
    shapes = {key: entry.shape for key, entry in open_weights(files.weights).entries.items()}
    if files.form == "MLX":
        return AdapterFacts(config, shapes, form="MLX", **known)
    return AdapterFacts(config, shapes, tuple(map(parse_tensor_name, shapes)), **known).with_faults()


def _number_faults(facts: AdapterFacts) -> tuple[str, ...]:
    try:
        if facts.form == "PEFT" and facts.peft_type == "LORA":
            check_numbers(facts.config, CONFIG)
    except AdapterError as error:
        return (str(error),)
    return ()


def _tensor_faults(facts: AdapterFacts) -> tuple[str, ...]:
    # The factors of expert parameters hold all experts at once, with further axes.
    of_peft = facts.form == "PEFT"
    if of_peft and (facts.peft_type != "LORA" or is_variant(facts.config, PARAMETERS)):
        return ()
    a, b = facts.factors("A"), facts.factors("B")
    if alone := sorted(a.keys() ^ b.keys()):
        return (f"{alone[0]} has only one of lora_A and lora_B ({len(alone)} such modules)",)
    if differ := sorted(module for module in a if not _is_pair(a[module], b[module])):
        return (f"lora_A and lora_B of {differ[0]} have different ranks ({len(differ)} such modules)",)
    ranks = facts.ranks() if of_peft else {}
    if wrong := sorted(module for module, rank in ranks.items() if rank != module_rank(facts.config, module)):
        rank, wanted = ranks[wrong[0]], module_rank(facts.config, wrong[0])
        return (f"{wrong[0]} has rank {rank}, {CONFIG} says {wanted} ({len(wrong)} such modules)",)
    return ()


def _is_pair(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) >= 2 and len(a) == len(b) and a[0] == b[1] and a[0] > 0
