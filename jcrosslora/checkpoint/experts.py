"""Read the experts of a layer, however they are stored, in one form."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jcrosslora.architectures.expert_rules import ExpertRules
from jcrosslora.architectures.family import Family
from jcrosslora.architectures.sizes import Dims


def layout_of(family: Family, names: Callable[[], list[str]]) -> Mapping[str, str] | None:
    """Return which of the layouts of a family's experts a model is stored in; None for a family without experts."""
    if family.experts is None:
        return None
    stored = {name.split(".", 3)[-1] for name in names() if name.startswith("model.layers.")}
    layouts = family.experts.layouts
    return next((layout for layout in layouts if layout["down"].format(0) in stored), layouts[0])


def is_loadable(layout: Mapping[str, str]) -> bool:
    """Whether classes load unquantised experts under the names of a layout, unlike those of GGUF and of MXFP4."""
    merged = "gate" in layout and "{}" not in layout["gate"]
    return not merged and not any(path.endswith("_blocks") for path in layout.values())


def expert_shapes(
    experts: ExpertRules, dims: Dims, config: Mapping[str, Any], layout: Mapping[str, str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name in a layer and the shape of each tensor of its experts as they are stored."""
    sizes = experts.sizes(config)
    count, _, columns = expert_shape(experts, dims, config, "gate_up")
    width = sizes.width
    shapes: dict[str, tuple[int, ...]] = {
        "router": (count, dims.hidden),
        "router_bias": (count,),
        "correction": (1,) * (experts.correction_axes - 1) + (count,),
        "gate": (count, width, columns),
        "up": (count, width, columns),
        "gate_up": expert_shape(experts, dims, config, "gate_up"),
        "down": expert_shape(experts, dims, config, "down"),
        "gate_up_bias": (count, 2 * width),
        "gate_bias": (count, width),
        "up_bias": (count, width),
        "down_bias": (count, columns),
    }
    for name, path in layout.items():
        shape = shapes[name]
        if "{}" in path:
            yield from ((path.format(expert), shape[1:]) for expert in range(count))
        elif path in experts.transposed:
            yield path, (shape[0], shape[2], shape[1])
        else:
            yield path, shape


def expert_shape(experts: ExpertRules, dims: Dims, config: Mapping[str, Any], matrix: str) -> tuple[int, int, int]:
    """Return (E, O, I) of a matrix of the experts of a layer, "gate_up" or "down"."""
    sizes = experts.sizes(config)
    columns = dims.hidden if sizes.latent is None else sizes.latent
    if matrix == "down":
        return sizes.number, columns, sizes.width
    return sizes.number, (2 if experts.gated else 1) * sizes.width, columns


def expert_tensors(experts: ExpertRules) -> tuple[str, ...]:
    """Name the tensors of a layer that `read_expert_tensor` reads, each with a first axis of experts."""
    return tuple(experts.layouts[-1])


def read_expert_tensor(
    experts: ExpertRules, layout: Mapping[str, str], read: Callable[[str], np.ndarray], count: int, name: str
) -> np.ndarray:
    """Read a tensor of the experts of a layer: "gate_up" (E, 2 I, H) with the rows of gate first, "down" (E, H, I), ...

    Without a gate "gate_up" is (E, I, H).

    Args:
        experts: of the family.
        layout: of the model.
        read: reads a tensor by its name in the layer.
        count: E.
        name: of `expert_tensors`.
    """
    if name not in layout:  # gate and up on their own
        parts = [name.replace("gate_up", part) for part in single_parts(experts)]
        return np.concatenate([read_expert_tensor(experts, layout, read, count, part) for part in parts], axis=1)
    path = layout[name]
    if "{}" in path:
        return np.stack([read(path.format(expert)) for expert in range(count)])
    array = read(path)
    if path in experts.transposed:
        array = array.swapaxes(1, 2)
    if experts.interleaved and name in ("gate_up", "gate_up_bias"):
        array = array[:, _in_turn(array.shape[1])]
    return array.reshape(count, *array.shape[1:]) if name != "correction" else array.reshape(count)


def single_parts(experts: ExpertRules) -> tuple[str, ...]:
    """Name the matrices of an expert whose rows "gate_up" holds, in their order."""
    return ("gate", "up") if experts.gated else ("up",)


def _in_turn(count: int) -> np.ndarray:
    """Return the place of each row, those of gate first, where rows of gate and up take turns."""
    return np.arange(count).reshape(-1, 2).T.reshape(-1)


def is_transposed(experts: ExpertRules, layout: Mapping[str, str], matrix: str) -> bool:
    """Whether a matrix, "gate_up" or "down", is stored as (E, I, O), so that its stored rows are columns."""
    return layout.get(matrix) in experts.transposed


def stored_rows(
    experts: ExpertRules,
    layout: Mapping[str, str],
    shape: tuple[int, int, int],
    matrix: str,
    expert: int,
    ids: np.ndarray,
) -> list[tuple[str, np.ndarray]]:
    """Return where rows of a matrix of one expert are: names of tensors in a layer, and rows of each.

    Args:
        experts: of the family.
        layout: of the model.
        shape: (E, O, I) of the matrix.
        matrix: "gate_up" or "down".
        expert: its number.
        ids: (n,) of O, or of I where the matrix is stored transposed, in increasing order.
    """
    if matrix not in layout:  # gate and up on their own
        names = single_parts(experts)
        height = shape[1] // len(names)
        own = (shape[0], height, shape[2])
        parts = [(name, ids[ids // height == place] - place * height) for place, name in enumerate(names)]
        return [place for part, rows in parts for place in stored_rows(experts, layout, own, part, expert, rows)]
    path = layout[matrix]
    if "{}" in path:
        return [(path.format(expert), ids)]
    transposed = is_transposed(experts, layout, matrix)
    if matrix == "gate_up" and experts.interleaved and not transposed:
        ids = _in_turn(shape[1])[ids]
    return [(path, expert * shape[2 if transposed else 1] + ids)]


def in_order(experts: ExpertRules, layout: Mapping[str, str], matrix: str, rows: np.ndarray) -> np.ndarray:
    """Return rows that were read at `stored_rows`, with the features of gate before those of up."""
    if matrix == "gate_up" and experts.interleaved and is_transposed(experts, layout, matrix):
        return rows[:, _in_turn(rows.shape[1])]
    return rows
