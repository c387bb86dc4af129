"""LoRA of expert weights in the two layouts of peft: one parameter for all experts, or one module per expert.

With `target_parameters` peft stacks the factors of all experts in one tensor, in the layout of `ParamWrapper` (peft
0.21).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jcrosslora.adapter.changes import ExpertUpdate, LoRAFactors
from jcrosslora.adapter.contents import FileDtype, WriteRequest, file_matrix
from jcrosslora.adapter.kinds.kind import ParsedAdapter
from jcrosslora.adapter.names import SINGLE_EXPERT, TensorName, exact_pattern, file_scale, module_rank, pattern_name
from jcrosslora.architectures import ExpertRules
from jcrosslora.checkpoint import BaseModel, text_module_name
from jcrosslora.checkpoint.layout import StoredExperts, single_parts
from jcrosslora.errors import AdapterError

_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
# (expert, its part) -> A and B.
_Singles = dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]


def read_experts(file: ParsedAdapter, tensors: Sequence[TensorName]) -> tuple[tuple[ExpertUpdate, ...], str]:
    """Read the updates of experts from the factors of modules for which `is_of_experts` holds.

    Returns them in order of layers, and "" or the reason why there are none.
    """
    base = file.base
    if not tensors or base is None:
        return (), "" if not tensors else "the base that it was trained on was not given"
    if base.family.experts is None:
        msg = f"{file.path}: updates experts, which the base {base.name} does not have; give the base it was trained on"
        raise AdapterError(msg)
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for tensor in tensors:
        modules[text_module_name(tensor.module)][tensor.kind] = tensor.key
    file = dataclasses.replace(file, modules=modules)
    found: dict[tuple[int, str], ExpertUpdate] = {}
    singles: dict[tuple[int, str], _Singles] = {}
    for module in modules:
        a, b = (file.part(module, side).astype(np.float32) for side in "AB")
        if single := SINGLE_EXPERT.match(module):
            part = _PARTS[single[3]]
            matrix = int(single[1]), "down" if part == "down" else "gate_up"
            b = b * np.float32(file_scale(file.config, module, a.shape[0]))
            singles.setdefault(matrix, {})[int(single[2]), part] = a, b
        else:
            update = _of_whole(file, base, module, a, b)
            found[update.layer, update.matrix] = update
    for (layer, matrix), parts in singles.items():
        found[layer, matrix] = _of_singles(file, base, layer, matrix, parts)
    return tuple(found[matrix] for matrix in sorted(found)), ""


def expert_tensors(updates: Sequence[ExpertUpdate], dtype: FileDtype) -> dict[str, np.ndarray]:
    """Return the factors as peft stores them, by name without its prefix."""
    both = {(update.layer, update.matrix) for update in updates}
    tensors = {}
    for update in updates:
        # The first parameter of a module is wrapped first.
        inner = update.matrix == "gate_up" and (update.layer, "down") in both
        module = update.name.rpartition(".")[0] + (".base_layer" if inner else "")
        a, b = np.asarray(update.a), np.asarray(update.b)
        if update.stores_transposes:
            a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
        count, rank, columns = a.shape
        b = b.transpose(1, 2, 0).reshape(b.shape[1], rank * count)
        for side, matrix in (("A", a.reshape(count * rank, columns)), ("B", b)):
            tensors[f"{module}.lora_{side}.weight"] = np.ascontiguousarray(file_matrix(update.name, matrix, dtype))
    return tensors


def stored_updates(update: ExpertUpdate, experts: StoredExperts) -> dict[str, ExpertUpdate | LoRAFactors]:
    """Return the update of a matrix by the base's tensor names: one for all experts, or one per expert.

    An update for all experts has the axes of the tensor, which may hold the transposes.
    """
    rules, paths, prefix = experts.rules, experts.paths, f"model.layers.{update.layer}."
    a, b = np.asarray(update.a), np.asarray(update.b)
    path = paths.get(update.matrix)
    if path is not None and "{}" not in path:
        if path in rules.transposed:
            update = dataclasses.replace(update, a=b.swapaxes(1, 2), b=a.swapaxes(1, 2))
        return {prefix + path: update}
    parts = single_parts(rules) if path is None else (update.matrix,)
    return {
        prefix + paths[part].format(expert): LoRAFactors(
            a=a[expert], b=b[expert, _rows(rules, b.shape[1], place, parts)]
        )
        for expert in range(len(b))
        for place, part in enumerate(parts)
    }


def _rows(rules: ExpertRules, rows: int, place: int, parts: Sequence[str]) -> slice:
    """Return the rows of one part in a fused gate and up matrix: alternating rows, or gate first."""
    height = rows // len(parts)
    return slice(place, None, len(parts)) if rules.interleaved else slice(height * place, height * (place + 1))


def expert_config(contents: WriteRequest, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of an `adapter_config.json` for updates of experts: their names, ranks, and scale 1."""
    names = {contents.class_name(update.name): update.a.shape[1] for update in contents.adapter.experts}
    if not names:
        return {}
    # peft warns of patterns of parameters, but uses them.
    patterns = {exact_pattern(name): rank for name, rank in names.items() if rank != config["r"]}
    merged = {key: {**config[key], **patterns} for key in ("rank_pattern", "alpha_pattern")}
    return {"target_parameters": [*config.get("target_parameters", ()), *names], **merged}


def _parameter_name(base: BaseModel, layer: int, matrix: str) -> str:
    return f"model.layers.{layer}.{base.experts.rules.layouts[-1][matrix]}"


def expert_update(
    base: BaseModel, layer: int, matrix: str, a: np.ndarray, b: np.ndarray, share: float | None = None
) -> ExpertUpdate:
    """Make the update of a matrix of a base's experts, see `ExpertUpdate`."""
    name, a, b = _parameter_name(base, layer, matrix), np.ascontiguousarray(a), np.ascontiguousarray(b)
    return ExpertUpdate(name, layer, matrix, a, b, base.experts.rules.stores_transposes, share)


def _of_whole(file: ParsedAdapter, base: BaseModel, module: str, a: np.ndarray, b: np.ndarray) -> ExpertUpdate:
    """Split the factors (E K, I) and (O, K E) of a parameter by expert."""
    experts = base.experts.rules
    count, layer = base.experts.shape("down")[0], int(module.split(".")[2])
    shapes = {matrix: base.experts.shape(matrix)[1:] for matrix in ("gate_up", "down")}
    came = b.shape[0], a.shape[1]
    # Early versions of peft took the axes of (E, O, I) for (E, I, O), and a class may yet say which of them it stores.
    usual = next((name for name, shape in shapes.items() if came == shape), None)
    other = next((name for name, shape in shapes.items() if came == shape[::-1]), None)
    swapped = other is not None and (experts.stores_transposes or usual is None)
    name = other if swapped else usual
    if name is None or a.shape[0] != b.shape[1] or a.shape[0] % count or layer not in base.layers_with("router"):
        msg = f"{file.path}: module {module!r} has A of shape {list(a.shape)} and B of shape {list(b.shape)}, which "
        msg += f"are of no parameter of {count} experts of the base {base.name}; give the base it was trained on"
        raise AdapterError(msg)
    whole, rank = _parameter_name(base, layer, name), a.shape[0] // count
    if rank != (stated := module_rank(file.config, pattern_name(file.config, whole))):
        msg = f"{file.path}: {whole!r} has rank {rank}, adapter_config.json says {stated}"
        raise AdapterError(msg + ": use the configuration that belongs to the file")
    b = b * np.float32(file_scale(file.config, whole, rank))
    each_a, each_b = a.reshape(count, rank, -1), b.reshape(b.shape[0], rank, count).transpose(2, 0, 1)
    if swapped:
        each_a, each_b = each_b.swapaxes(1, 2), each_a.swapaxes(1, 2)
    return expert_update(base, layer, name, each_a, each_b)


def _of_singles(file: ParsedAdapter, base: BaseModel, layer: int, matrix: str, parts: _Singles) -> ExpertUpdate:
    """Join the factors of single experts; gate and up are side by side along the rank, each with its own rows."""
    experts = base.experts.rules
    count, rows, columns = base.experts.shape(matrix)
    names = ("down",) if matrix == "down" else single_parts(experts)
    height = rows // len(names)
    rank = max(a.shape[0] for a, _ in parts.values())
    each_a = np.zeros((count, rank * len(names), columns), np.float32)
    each_b = np.zeros((count, rows, rank * len(names)), np.float32)
    for (expert, part), (a, b) in parts.items():
        index = names.index(part) if part in names else -1
        if index < 0 or expert >= count or b.shape[0] != height or a.shape[1] != columns or a.shape[0] != b.shape[1]:
            msg = f"{file.path}: expert {expert} of layer {layer} has A of shape {list(a.shape)} and B of shape "
            msg += f"{list(b.shape)}, which do not fit the base {base.name}; give the base it was trained on"
            raise AdapterError(msg)
        ranks = slice(rank * index, rank * index + len(a))
        each_a[expert, ranks], each_b[expert, _rows(experts, rows, index, names), ranks] = a, b
    if layer not in base.layers_with("router"):
        raise AdapterError(f"{file.path}: updates experts of layer {layer}, where the base {base.name} has none")
    return expert_update(base, layer, matrix, each_a, each_b)
