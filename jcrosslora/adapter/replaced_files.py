"""Read and write the tensors of an adapter file that replace those of its base.

peft stores them under `modules_to_save` (norms, whole layers with their biases), `bias` (trained biases) and
`lora_bias` (b, of which s b is added to the base's bias).

Sources: peft 0.21, tuners/lora/layer.py, utils/other.py.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jcrosslora.adapter.changes import ReplacedTensors
from jcrosslora.adapter.contents import FileDtype, exact_dtype, file_matrix
from jcrosslora.adapter.kinds.kind import AdapterFile, Kind, read_or_reason
from jcrosslora.adapter.kinds.plain import PLAIN
from jcrosslora.adapter.names import TensorName
from jcrosslora.adapter.patterns import file_scale
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.wrapped import text_module_name
from jcrosslora.errors import AdapterError

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
    shapes = {} if file.base is None else file.base.tensor_shapes()
    found: dict[str, dict[str, np.ndarray]] = {}
    read: set[str] = set()
    reasons: dict[str, str] = {}
    for change in ("full", "bias", "lora_bias"):
        for tensor in extras.get(change, ()):
            taken = {*(f"{name}.weight" for name in updated), *(name for group in found.values() for name in group)}
            named, why = read_or_reason(partial(_read, kind, file, tensor, shapes, taken))
            if named is None:  # the rest of the adapter is still read
                reasons[change] = why
                continue
            name, array = named
            found.setdefault(change, {})[name] = array
            read.add(tensor.key)
    return tuple(ReplacedTensors(change, tensors) for change, tensors in found.items()), read, reasons


def _read(
    kind: Kind, file: AdapterFile, tensor: TensorName, shapes: Mapping[str, tuple[int, ...]], taken: set[str]
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
    if tensor.kind == "lora_bias":
        array = _summed(kind, file, base, tensor.module, name, array)
    if name in taken:
        msg = f"{name} is changed in another way as well"
        raise AdapterError(msg)
    return name, array


def _summed(kind: Kind, file: AdapterFile, base: BaseModel, module: str, name: str, array: np.ndarray) -> np.ndarray:
    """Add the bias of a LoRA to that of the base, in float32."""
    if kind is not PLAIN:
        msg = f"a bias of the LoRA is not read of a {kind.name}"
        raise AdapterError(msg)
    change = file_scale(file.config, module) * array.astype(np.float64)
    return (np.asarray(base.tensor(name)).astype(np.float64) + change).astype(np.float32)


def replaced_tensors(
    replaced: Sequence[ReplacedTensors], adapted: Mapping[str, object], dtype: FileDtype
) -> dict[str, np.ndarray]:
    """Return the tensors by their names in the text model, in float32 unless the dtype holds them exactly.

    Args:
        replaced: the tensors to write.
        adapted: the modules with a LoRA, whose biases peft keeps in a layer inside.
        dtype: of the file.

    Raises:
        OutputError: values that are not finite.
    """
    tensors = {}
    for name, array in (item for group in replaced for item in group.tensors.items()):
        module, array = _module(name), np.asarray(array)
        inner = name.endswith(_BIAS) and module in adapted
        cast = file_matrix(name, array.astype(np.float64), exact_dtype([array], dtype))
        tensors[f"{module}.base_layer{_BIAS}" if inner else name] = np.ascontiguousarray(cast)
    return tensors


def replaced_config(replaced: Sequence[ReplacedTensors], adapted: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings under which peft loads the tensors of `replaced_tensors`."""
    names = [name for group in replaced for name in group.tensors]
    # peft compares the ends of names: a full one does not end as any other.
    whole = sorted({_module(name) for name in names if not name.endswith(_BIAS)})
    biased = {_module(name) for name in names if name.endswith(_BIAS)} - set(whole)
    config: dict[str, Any] = {"modules_to_save": whole} if whole else {}
    return config | ({"bias": "all" if biased - set(adapted) else "lora_only"} if biased else {})


def _module(name: str) -> str:
    return name.rpartition(".")[0]
