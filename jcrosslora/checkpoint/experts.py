"""Find the experts of a model by name, shape and row, and read them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jcrosslora.architectures import ExpertRules, Family
from jcrosslora.checkpoint.store import TensorStore


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


def expert_tensors(rules: ExpertRules) -> tuple[str, ...]:
    """Name the tensors of a layer that `StoredExperts.tensor` reads, each with a first axis of experts."""
    return tuple(rules.layouts[-1])


def single_parts(rules: ExpertRules) -> tuple[str, ...]:
    """Name the matrices of an expert whose rows "gate_up" holds, in their order."""
    return ("gate", "up") if rules.gated else ("up",)


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """The names and shapes of the experts of each layer: E experts with I inner features.

    Attributes:
        paths: one of `ExpertRules.layouts`.
        hidden: features of the residual stream.
    """

    rules: ExpertRules
    paths: Mapping[str, str]
    config: Mapping[str, Any]
    hidden: int

    def shape(self, matrix: str) -> tuple[int, int, int]:
        """Return (E, O, I) of a matrix of all experts of a layer, "gate_up" or "down"."""
        sizes = self.rules.sizes(self.config)
        columns = self.hidden if sizes.latent is None else sizes.latent
        if matrix == "down":
            return sizes.number, columns, sizes.width
        return sizes.number, len(single_parts(self.rules)) * sizes.width, columns

    def axis(self, matrix: str) -> int:
        """Return the axis of `shape` that `StoredExperts.rows` counts: 2 if the matrix is stored transposed."""
        return 2 if self.paths.get(matrix) in self.rules.transposed else 1

    def stored_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the path in a layer and the shape of each tensor as it is stored."""
        count, columns, width = self.shape("down")
        shapes: dict[str, tuple[int, ...]] = {
            "router": (count, self.hidden),
            "router_bias": (count,),
            "correction": (1,) * (self.rules.correction_axes - 1) + (count,),
            "gate": (count, width, columns),
            "up": (count, width, columns),
            "gate_up": self.shape("gate_up"),
            "down": (count, columns, width),
            "gate_up_bias": (count, 2 * width),
            "gate_bias": (count, width),
            "up_bias": (count, width),
            "down_bias": (count, columns),
        }
        for name, path in self.paths.items():
            shape = shapes[name]
            if "{}" in path:
                yield from ((path.format(expert), shape[1:]) for expert in range(count))
            else:
                yield path, (shape[0], shape[2], shape[1]) if path in self.rules.transposed else shape


@dataclass(frozen=True, eq=False)
class StoredExperts(ExpertLayout):
    """The experts of an opened model, read from its tensors."""

    store: TensorStore

    def names(self, layer: int) -> tuple[str, ...]:
        """Return the names of the tensors of a layer's experts as they are stored."""
        return tuple(_in_layer(layer, path) for path, _ in self.stored_shapes())

    def dtype(self, layer: int, matrix: str) -> str:
        """Return the storage dtype of a matrix, "gate_up" or "down"."""
        path = self.paths["up" if matrix not in self.paths else matrix]
        return self.store.dtype(_in_layer(layer, path.format(0)))

    def tensor(self, layer: int, name: str) -> np.ndarray:
        """Read a tensor of all experts: "gate_up" (E, 2 I, H) with the rows of gate first, "down" (E, H, I), ...

        Without a gate "gate_up" is (E, I, H). `name` is one of `expert_tensors`.

        Raises:
            CheckpointError: a dtype that cannot be read.
        """
        if name not in self.paths:  # gate and up on their own
            parts = [name.replace("gate_up", part) for part in single_parts(self.rules)]
            return np.concatenate([self.tensor(layer, part) for part in parts], axis=1)
        path, count = self.paths[name], self.rules.sizes(self.config).number
        if "{}" in path:
            return np.stack([self.store.tensor(_in_layer(layer, path.format(expert))) for expert in range(count)])
        array = self.store.tensor(_in_layer(layer, path))
        if path in self.rules.transposed:
            array = array.swapaxes(1, 2)
        if self.rules.interleaved and name in ("gate_up", "gate_up_bias"):
            array = array[:, _in_turn(array.shape[1])]
        return array.reshape(count) if name == "correction" else array.reshape(count, *array.shape[1:])

    def rows(self, layer: int, matrix: str, expert: int, ids: np.ndarray) -> np.ndarray:
        """Read rows of a matrix of one expert as float32 (n, columns), and no others.

        `ids` (n,) count `axis` of the matrix, "gate_up" or "down", in increasing order.
        """
        found = self._stored_rows(matrix, expert, np.asarray(ids, np.int64), self.shape(matrix))
        rows = np.concatenate([self.store.rows(_in_layer(layer, path), own) for path, own in found])
        if matrix == "gate_up" and self.rules.interleaved and self.axis(matrix) == 2:
            return rows[:, _in_turn(rows.shape[1])]
        return rows

    def _stored_rows(
        self, matrix: str, expert: int, ids: np.ndarray, shape: tuple[int, int, int]
    ) -> list[tuple[str, np.ndarray]]:
        """Return where rows of a matrix are: paths of tensors in a layer, and rows of each."""
        if matrix not in self.paths:  # gate and up on their own
            names = single_parts(self.rules)
            height = shape[1] // len(names)
            parts = [(name, ids[ids // height == place] - place * height) for place, name in enumerate(names)]
            own = (shape[0], height, shape[2])
            return [found for name, rows in parts for found in self._stored_rows(name, expert, rows, own)]
        path = self.paths[matrix]
        if "{}" in path:
            return [(path.format(expert), ids)]
        axis = self.axis(matrix)
        if matrix == "gate_up" and self.rules.interleaved and axis == 1:
            ids = _in_turn(shape[1])[ids]
        return [(path, expert * shape[axis] + ids)]


def _in_layer(layer: int, path: str) -> str:
    return f"model.layers.{layer}.{path}"


def _in_turn(count: int) -> np.ndarray:
    """Return the stored place of each row, those of gate first, if rows of gate and up alternate."""
    return np.arange(count).reshape(-1, 2).T.reshape(-1)
