"""What can be known of an adapter folder of any kind without reading its tensors: configuration, names, shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jcrosslora.adapter.config import check_numbers
from jcrosslora.adapter.folder import CONFIG, MLX_WEIGHTS, PICKLE, WEIGHTS, open_weights, read_config
from jcrosslora.adapter.names import TensorName, parse_tensor_name
from jcrosslora.adapter.patterns import module_rank, module_scale
from jcrosslora.errors import AdapterError


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter folder as the engine rules see it.

    Attributes:
        config: its `adapter_config.json`.
        shapes: tensor name to shape; empty where the weights are a pickle.
        tensors: the same names, parsed.
        pickle: whether the weights are `adapter_model.bin`.
        mlx: whether it is in the format of MLX.
        family: the base's family ("llama", "qwen2", ...), None where it is not known.
        faults: what is wrong with the numbers of the configuration or the shapes, whatever the engine.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: tuple[TensorName, ...] = ()
    pickle: bool = False
    mlx: bool = False
    family: str | None = None
    faults: tuple[str, ...] = ()

    @property
    def peft_type(self) -> str:
        """The type in capitals, "" where there is none."""
        return str(self.config.get("peft_type") or "").upper()

    def factors(self, side: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the A or B of each module; for A the rank is the first number."""
        return {tensor.module: self.shapes[tensor.key] for tensor in self.tensors if tensor.kind == side}

    def scales(self) -> dict[str, float]:
        """The scale with which PEFT applies each module; only to be asked for where there are no faults."""
        return {module: module_scale(self.config, module, shape[0]) for module, shape in self.factors("A").items()}


def read_facts(folder: Path, family: str | None = None) -> AdapterFacts:
    """The facts of an adapter folder.

    Raises:
        AdapterError: not an adapter folder, or a file of it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        msg = f"{folder}: no {CONFIG} here: give the folder of an adapter"
        raise AdapterError(msg)
    config = read_config(folder / CONFIG)
    mlx = "peft_type" not in config and ("fine_tune_type" in config or (folder / MLX_WEIGHTS).is_file())
    weights = folder / (MLX_WEIGHTS if mlx else WEIGHTS)
    if not weights.is_file() and (folder / PICKLE).is_file():
        return AdapterFacts(config, pickle=True, family=family, faults=_number_faults(config))
    if not weights.is_file():
        msg = f"{folder}: no {weights.name} here: the adapter is incomplete, save or download it again"
        raise AdapterError(msg)
    shapes = {key: entry.shape for key, entry in open_weights(weights).entries.items()}
    tensors = tuple(parse_tensor_name(key) for key in shapes)
    faults = () if mlx else _number_faults(config) or _tensor_faults(config, shapes, tensors)
    return AdapterFacts(config, shapes, tensors, mlx=mlx, family=family, faults=faults)


def _number_faults(config: Mapping[str, Any]) -> tuple[str, ...]:
    if str(config.get("peft_type")).upper() != "LORA":
        return ()
    try:
        check_numbers(config, CONFIG)
    except AdapterError as error:
        return (str(error),)
    return ()


def _tensor_faults(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tensors: tuple[TensorName, ...]
) -> tuple[str, ...]:
    # The factors of expert parameters hold all experts at once, with axes of their own.
    if str(config.get("peft_type")).upper() != "LORA" or config.get("target_parameters"):
        return ()
    a, b = ({t.module: shapes[t.key] for t in tensors if t.kind == side} for side in "AB")
    alone = sorted(a.keys() ^ b.keys())
    unlike = sorted(module for module in a.keys() & b.keys() if not _belong_together(a[module], b[module]))
    if alone:
        return (f"{alone[0]} has only one of lora_A and lora_B ({len(alone)} such modules)",)
    if unlike:
        return (f"lora_A and lora_B of {unlike[0]} have different ranks ({len(unlike)} such modules)",)
    wrong = sorted(module for module, shape in a.items() if shape[0] != module_rank(config, module))
    if wrong:
        rank, wanted = a[wrong[0]][0], module_rank(config, wrong[0])
        return (f"{wrong[0]} has rank {rank}, {CONFIG} says {wanted} ({len(wrong)} such modules)",)
    return ()


def _belong_together(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) >= 2 and len(a) == len(b) and a[0] == b[1] and a[0] > 0
