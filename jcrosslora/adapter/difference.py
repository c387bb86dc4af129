"""The difference of two models of one architecture: linear modules at low rank, and the size of everything else."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.architectures.blocks import EMBEDDING, HEAD, LAYER_EMBEDDING
from jcrosslora.checkpoint import BaseModel, expert_tensors
from jcrosslora.checkpoint.weight_stacks import bounded_groups, load_stack
from jcrosslora.errors import CheckpointError
from jcrosslora.linalg import decompose, dot, shard

Rest = Literal["embeddings", "norms", "biases", "experts", "other tensors"]
_BY_TOKEN = (EMBEDDING, HEAD, LAYER_EMBEDDING)  # one row per token
_ROWS = 4096  # compared at a time
_ROUNDING = 2.0**-20  # of sums of squares in float32


@dataclass(frozen=True, eq=False)
class Leading:
    """The leading singular triplets of a difference D (O, I) above float32 rounding.

    With inputs X (N, I) they are the triplets of D X'.

    Attributes:
        factors: B A = U U' D, which is U diag(s) V' without inputs, with sizes split evenly between the two; of rank R.
        s: (R,), descending.
        energy: ||D||_F^2, or ||D X'||_F^2.
    """

    factors: LoRAFactors
    s: np.ndarray
    energy: float

    @property
    def kept(self) -> float:
        """The share of the energy that the triplets hold; 1 where the rest is no more than float32 rounding."""
        held = float(np.sum(np.square(self.s, dtype=np.float64)))
        return held / self.energy if held < (1 - _ROUNDING) * self.energy else 1.0

    def lowest_rank(self, share: float) -> int:
        """Return the lowest rank that holds a share of the energy; R if none does."""
        held = np.cumsum(np.square(self.s, dtype=np.float64))
        return min(int(np.searchsorted(held, share * self.energy)) + 1, len(held))

    def cut(self, rank: int) -> "Leading":
        """Keep at most `rank` triplets, and free the memory of the others."""
        if rank >= len(self.s):
            return self
        factors = LoRAFactors(a=np.array(self.factors.a[:rank]), b=np.array(self.factors.b[:, :rank]))
        return replace(self, factors=factors, s=self.s[:rank])


def module_differences(
    first: BaseModel,
    second: BaseModel,
    shapes: Mapping[str, tuple[int, ...]],
    limit: Callable[[tuple[int, ...]], int],
    inputs: Callable[[str], jax.Array] | None = None,
    *,
    scales: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Iterator[tuple[str, Leading]]:
    """Decompose W_first - W_second of each module, group by group: memory is bounded whatever the model's size.

    Args:
        shapes: of the modules, logical or fused, that both have.
        limit: returns the largest rank for a shape.
        inputs: returns the inputs X (N, I) of a module in the first, to decompose D X'; None decomposes D.
        scales: returns the scales of a module's rows (O,) and columns (I,) that map W_first, and X with it, to the
            channels of the second, see `relation.channels`.

    Raises:
        CheckpointError: a weight cannot be read or is not finite.
    """
    for names in bounded_groups(list(shapes), shapes.__getitem__, lambda name: 8 * prod(shapes[name])):
        stack, columns = load_stack(first, names), []
        if scales is not None:
            sides = [scales(name) for name in names]
            sides += sides[-1:] * (len(stack) - len(names))
            rows, columns = (np.stack(side) for side in zip(*sides, strict=True))
            stack = shard(rows)[:, :, None] * stack * shard(columns)[:, None]
        stack = stack - load_stack(second, names)
        rank = max(1, min(limit(shapes[names[0]]), *shapes[names[0]]))
        acting = stack
        if inputs is not None:  # D X' (L', O, N), with the last one repeated where the stack is padded
            rows = [np.asarray(inputs(name)).T for name in names]
            if scales is not None:
                rows = [x / one[:, None] for x, one in zip(rows, columns, strict=False)]
            acting = dot(stack, shard(np.stack([*rows, *rows[-1:] * (len(stack) - len(rows))])))
        rank = min(rank, acting.shape[2])
        # Any vectors that hold the energy will do, so no decomposition has to be repeated at a higher accuracy.
        svd, _ = decompose(acting, rank, vectors=False, tolerance=float("inf"))
        energies = np.asarray(jnp.sum(acting**2, axis=(1, 2)), np.float64)
        rows = svd.v * svd.s[:, None] if inputs is None else dot(stack.mT, svd.u)
        u, s, v, counts = (np.asarray(field) for field in (svd.u, svd.s, rows, svd.numerical_rank))
        for name, *found, count, energy in zip(names, u, s, v, counts, energies, strict=False):
            yield name, _leading(*found, rank=int(count), energy=float(energy))


def _leading(u: np.ndarray, s: np.ndarray, rows: np.ndarray, *, rank: int, energy: float) -> Leading:
    """Return U (U' D) from U (O, R) and D' U (I, R), with the size of each triplet split evenly."""
    rank = rank if energy > 0 else 0
    root = np.sqrt(np.linalg.norm(rows[:, :rank], axis=0))
    factors = LoRAFactors(a=np.ascontiguousarray((rows[:, :rank] / root).T), b=u[:, :rank] * root)
    return Leading(factors, s[:rank].copy(), energy)


def check_alike(finetune: BaseModel, base: BaseModel) -> str | None:
    """Check that two models have the same tensors; return a sentence if only the sizes of the vocabularies differ.

    Raises CheckpointError if a tensor of one is missing in the other, or has another shape.
    """
    found = [_layout(one) for one in (finetune, base)]
    odd = next((name for name in {**found[1], **found[0]} if found[0].get(name) != found[1].get(name)), None)
    if odd is not None:
        came, wanted = (" x ".join(map(str, one.get(odd, ("missing",)))) for one in found)
        msg = f"{finetune.name} is no fine-tune of {base.name}: {odd} is {came} in it, and {wanted} in the base: give "
        raise CheckpointError(msg + "the base that it was trained from")
    rows = finetune.dims.vocab, base.dims.vocab
    if rows[0] == rows[1]:
        return None
    return f"the fine-tune has {rows[0]} tokens, the base {rows[1]}: the first {min(rows)} rows are compared"


def rest_of(finetune: BaseModel, base: BaseModel) -> dict[Rest, dict[str, float]]:
    """Compute ||T_finetune - T_base||_F^2 of every tensor T outside linear modules that differs, by kind and name."""
    found: dict[Rest, dict[str, float]] = {}
    tables = (EMBEDDING,) if finetune.tied and base.tied else (EMBEDDING, HEAD)
    modules = {module.tensor for module in base.modules.values()}
    for name in (*tables, *(one for one in _layout(base) if one not in modules)):
        if size := _energy(finetune, base, name):
            found.setdefault(_kind(name), {})[name] = size
    for layer in base.layers_with("router"):
        if size := _of_experts(finetune, base, layer):
            found.setdefault("experts", {})[f"model.layers.{layer}"] = size
    return found


def _layout(base: BaseModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors but embedding, head and experts; for tables by token, the shape of a row."""
    experts = {name for layer in base.layers_with("router") for name in base.experts.names(layer)}
    shapes = {name: shape for name, shape in base.tensor_shapes().items() if name not in {EMBEDDING, HEAD, *experts}}
    return {name: shape[1:] if name in _BY_TOKEN else shape for name, shape in shapes.items()}


def _kind(name: str) -> Rest:
    if name in (EMBEDDING, HEAD):
        return "embeddings"
    if name.endswith(".bias"):
        return "biases"
    return "norms" if "norm" in name and name.endswith(".weight") else "other tensors"


def _energy(finetune: BaseModel, base: BaseModel, name: str) -> float:
    if name not in _BY_TOKEN:
        return _squared(*(one.tensor(name) for one in (finetune, base)))
    rows = min(finetune.dims.vocab, base.dims.vocab)
    total = 0.0
    for start in range(0, rows, _ROWS):
        ids = np.arange(start, min(start + _ROWS, rows))
        total += _squared(*(one.rows(name, ids) for one in (finetune, base)))
        finetune.release()
        base.release()
    return total


def _of_experts(finetune: BaseModel, base: BaseModel, layer: int) -> float:
    """Compute ||dT||_F^2 of a layer's router and experts, in whatever layouts the two models store them."""
    names = expert_tensors(base.experts.rules)
    pairs = (zip(*(one.experts.tensor(layer, name) for one in (finetune, base)), strict=True) for name in names)
    total = sum(_squared(*pair) for each in pairs for pair in each)
    finetune.release()
    base.release()
    return total


def _squared(first: np.ndarray, second: np.ndarray) -> float:
    """Compute ||first - second||_F^2; scalars count too."""
    return float(np.sum(np.square(first.astype(np.float32) - second.astype(np.float32)), dtype=np.float64))
