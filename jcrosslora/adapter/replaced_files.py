"""Read and write the tensors of an adapter file that replace those of its base.

peft stores them under `modules_to_save` (norms, whole layers with their biases), `bias` (trained biases) and
`lora_bias` (b, of which s b is added to the base's bias).

Sources: peft 0.21, tuners/lora/layer.py, utils/other.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jcrosslora.adapter.contents import DTYPES, FileDtype, file_matrix
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Kind
from jcrosslora.adapter.kinds.plain import PLAIN, pattern_name
from jcrosslora.adapter.names import TensorName
from jcrosslora.adapter.patterns import module_rank, module_scale
from jcrosslora.adapter.replaced import ReplacedTensors
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.wrapped import text_module_name
from jcrosslora.errors import AdapterError, JCrossLoRAError

_BIAS = ".bias"


def read_replaced(
    kind: Kind, file: AdapterFile, extras: Mapping[str, Sequence[TensorName]], updated: Mapping[str, object]
) -> tuple[tuple[ReplacedTensors, ...], set[str], dict[str, str]]:
    """Read the tensors that replace those of the base.

    Args:
        kind: of the adapter.
        file: with its base, without which nothing is read.
        extras: tensors that are not part of a linear layer's update, by kind, without those of embedding and head.
        updated: the modules that have a low-rank update.

    Returns:
        The tensors; the names in the file that they were read from; and for each kind of change of which something was
        not read the reason.
    """
    base = file.base
    shapes = {} if base is None else base.tensor_shapes()
    found: dict[str, dict[str, np.ndarray]] = {}
    read: set[str] = set()
    reasons: dict[str, str] = {}
    for change in ("full", "bias", "lora_bias"):
        for tensor in extras.get(change, ()):
            try:
                with np.errstate(over="raise", invalid="raise"):
                    name, array = _read(kind, file, tensor, shapes)
                    _check_alone(name, updated, found)
            # A damaged tensor stays what it was; the rest of the adapter is still read.
            except (JCrossLoRAError, ArithmeticError, LookupError, TypeError, ValueError) as error:
                reasons[change] = str(error) if isinstance(error, JCrossLoRAError) else "the file is damaged"
                continue
            found.setdefault(change, {})[name] = array
            read.add(tensor.key)
    return tuple(ReplacedTensors(change, tensors) for change, tensors in found.items()), read, reasons


def _read(
    kind: Kind, file: AdapterFile, tensor: TensorName, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, np.ndarray]:
    base, module = file.base, text_module_name(tensor.module)
    if base is None:
        msg = "the base that it was trained on was not given"
        raise AdapterError(msg)
    name = f"{module}.weight" if tensor.kind == "full" else f"{module}{_BIAS}"
    if name not in shapes:
        msg = f"the base {base.name} has no {name}"
        if tensor.kind == "lora_bias":
            msg += " to add it to, so what is written predicts something else: run the adapter unmerged, in peft"
        raise AdapterError(msg)
    array = file.read(tensor.key, axes=len(shapes[name]))
    if array.shape != shapes[name]:
        came, wanted = (" x ".join(map(str, shape)) for shape in (array.shape, shapes[name]))
        msg = f"{name} is {came}, in the base {base.name} it is {wanted}"
        raise AdapterError(msg)
    return name, _summed(kind, file, base, tensor.module, name, array) if tensor.kind == "lora_bias" else array


def _check_alone(name: str, updated: Mapping[str, object], found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    if any(name in tensors for tensors in found.values()) or name.removesuffix(".weight") in updated:
        msg = f"{name} is changed in another way as well"
        raise AdapterError(msg)


def _summed(kind: Kind, file: AdapterFile, base: BaseModel, module: str, name: str, array: np.ndarray) -> np.ndarray:
    """Add the bias of a LoRA to that of the base, in float32."""
    if kind is not PLAIN:
        msg = f"a bias of the LoRA is not read of a {kind.name}"
        raise AdapterError(msg)
    pattern = pattern_name(file.config, module)
    scale = module_scale(file.config, pattern, module_rank(file.config, pattern))
    return (np.asarray(base.tensor(name)).astype(np.float64) + scale * array.astype(np.float64)).astype(np.float32)


def replaced_tensors(
    replaced: Sequence[ReplacedTensors], adapted: Mapping[str, object], dtype: FileDtype
) -> dict[str, np.ndarray]:
    """Return the tensors by their names in the text model, in float32 unless its dtype holds them exactly.

    Args:
        replaced: what to write.
        adapted: the modules with a LoRA, whose biases peft keeps in a layer inside.
        dtype: of the file.

    Raises:
        OutputError: values that are not finite.
    """

    def stored(name: str) -> str:
        inner = name.endswith(_BIAS) and _module(name) in adapted
        return f"{_module(name)}.base_layer{_BIAS}" if inner else name

    named = [item for group in replaced for item in group.tensors.items()]
    return {stored(name): _cast(name, np.asarray(array), dtype) for name, array in named}


def replaced_config(replaced: Sequence[ReplacedTensors], adapted: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings under which peft loads what `replaced_tensors` names."""
    names = [name for group in replaced for name in group.tensors]
    # peft compares the ends of names: a full one does not end as any other.
    whole = sorted({_module(name) for name in names if not name.endswith(_BIAS)})
    biased = {_module(name) for name in names if name.endswith(_BIAS)} - set(whole)
    config: dict[str, Any] = {"modules_to_save": whole} if whole else {}
    return config | ({"bias": "all" if biased - set(adapted) else "lora_only"} if biased else {})


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _cast(name: str, array: np.ndarray, dtype: FileDtype) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        exact = bool((array.astype(DTYPES[dtype]).astype(array.dtype) == array).all())
    return np.ascontiguousarray(file_matrix(name, array.astype(np.float64), dtype if exact else "float32"))
