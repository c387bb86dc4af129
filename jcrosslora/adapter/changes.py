"""The changes of an adapter as pytrees: factors of linear modules, token rows, replaced tensors, experts.

V tokens, D the width of the residual stream, n the tokens whose rows change.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import flax.struct
import jax
import numpy as np
from jax.core import Tracer

from jcrosslora.checkpoint.base import BaseModel

Array = jax.Array | np.ndarray
T = TypeVar("T")


@flax.struct.dataclass
class LoRAFactors:
    """The update of one linear module with weight W of shape (O, I): dW = scale * b @ a.

    Attributes:
        a: (K, I), reads the input of the module; (N, K, I) in a stack of N adapters.
        b: (O, K), writes its output; (N, O, K) in a stack.
        scale: a Python float: alpha / r, or alpha / sqrt(r) for rsLoRA. Static, not a leaf.
    """

    a: Array
    b: Array
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def rank(self) -> int:
        """K, the number of rows of `a`."""
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), the shape of the weight that the update is for."""
        return self.b.shape[-2], self.a.shape[-1]


def update_norm(factors: LoRAFactors) -> float:
    """Compute ||scale B A||_F in float64 from the K x K Gram matrices: ||B A||^2 = sum(B'B * AA').

    The product is never formed. A stack gives the norm of all its updates together.
    """
    a, b = (np.asarray(matrix).astype(np.float64) for matrix in (factors.a, factors.b))
    # Rounding can leave a product of factors that cancel just below zero.
    squared = float(np.sum((b.swapaxes(-1, -2) @ b) * (a @ a.swapaxes(-1, -2))))
    return abs(factors.scale) * math.sqrt(max(0.0, squared))


@dataclass(frozen=True)
class Static:
    """The static parts of a pytree node: `structure` decides the computation, `metadata` is not compared."""

    structure: Any
    metadata: Any = field(compare=False)

    def metadata_or_default(self, children: Any, default: Any) -> Any:
        """Return the metadata; inside a transformed function, where one program serves many adapters, the default."""
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(children))
        return default if traced else self.metadata


def _register(arrays: Sequence[str], metadata: Sequence[str]) -> Callable[[type[T]], type[T]]:
    """Register a dataclass as a pytree.

    `arrays` names the fields that are leaves or pytrees. `metadata` names fields outside the structure; inside a
    transformed function they have their defaults. All others are the structure; its arrays are int64 (n,).
    """

    def register(cls: type[T]) -> type[T]:
        names = [one.name for one in fields(cls)]  # type: ignore[arg-type]
        static = [name for name in names if name not in {*arrays, *metadata}]

        def flatten(change: T) -> tuple[tuple, Static]:
            children = tuple((jax.tree_util.GetAttrKey(name), getattr(change, name)) for name in arrays)
            structure = tuple(_hashable(getattr(change, name)) for name in static)
            return children, Static(structure, {name: getattr(change, name) for name in metadata})

        def unflatten(aux: Static, children: Any) -> T:
            structure = dict(zip(static, map(_restored, aux.structure), strict=True))
            return cls(**dict(zip(arrays, children, strict=True)), **structure, **aux.metadata_or_default(children, {}))

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register


def _hashable(value: Any) -> Any:
    return np.asarray(value, np.int64).tobytes() if isinstance(value, np.ndarray) else value


def _restored(value: Any) -> Any:
    return np.frombuffer(value, np.int64) if isinstance(value, bytes) else value


@_register(arrays=("tensors",), metadata=("share",))
@dataclass(frozen=True, eq=False)
class ReplacedTensors:
    """Tensors that replace those of the adapter's base, and fit no other base: trained biases, norms, whole layers.

    Attributes:
        kind: the tensors that they were read from: "full", "bias" or "lora_bias" of `records.CHANGES`.
        tensors: maps the base's tensor names to new values of the same shape. The leaves.
        share: its share of the whole adapter's squared Frobenius norm; None if unknown.
    """

    kind: str
    tensors: Mapping[str, Array]
    share: float | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that change."""
        return tuple(name.rpartition(".")[0] for name in self.tensors)


@_register(arrays=("a", "b"), metadata=("share",))
@dataclass(frozen=True, eq=False)
class ExpertUpdate:
    """The update dW[e] = b[e] @ a[e] of one matrix of all E experts of a layer.

    Attributes:
        name: the parameter's name in the base's class, e.g. "model.layers.0.mlp.experts.gate_up_proj".
        matrix: "gate_up", whose rows are in the order of the class, or "down".
        a: float32 (E, K, I).
        b: float32 (E, O, K), with the scale.
        stores_transposes: whether peft's files hold the factors of its transpose, see `ExpertRules.stores_transposes`.
        share: its share of the whole adapter's squared Frobenius norm.
    """

    name: str
    layer: int
    matrix: str
    a: Array
    b: Array
    stores_transposes: bool = False
    share: float | None = None

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        a, b = np.asarray(self.a), np.asarray(self.b)
        left, right = b.swapaxes(1, 2) @ b, a @ a.swapaxes(1, 2)
        return float(np.sum(left * right, dtype=np.float64))


EMBEDDING, HEAD = "embed_tokens", "lm_head"
# Both, if the base ties the two and the adapter has one change for them.
TIED = "tied"
MODULES: Mapping[str, tuple[str, ...]] = {
    EMBEDDING: ("model.embed_tokens",),
    HEAD: ("lm_head",),
    TIED: ("model.embed_tokens", "lm_head"),
}
_AT_ONCE = 4096  # rows


@_register(arrays=("factors", "rows"), metadata=("energy", "lost", "share"))
@dataclass(frozen=True, eq=False)
class TokenUpdate:
    """The change of an embedding, of an output head, or of the one matrix that is both: by `factors` or by `rows`.

    Attributes:
        table: the matrix that changes, a key of `MODULES`.
        kind: the tensors that it was read from, a key of `records.CHANGES`.
        size: V.
        ids: int64 (n,), ascending. Static: gradients reject indices, and arithmetic over leaves would change them.
        factors: low-rank change of the rows: a (K, D), b (n, K).
        rows: float32 (n, D), the new rows. All V of them replace the whole matrix.
        energy: squared Frobenius norm of the change.
        lost: squared Frobenius norm that truncation removed when it was read.
        share: its share of `energy` plus `lost` in the whole adapter that it was read from.
    """

    table: str
    kind: str
    size: int
    ids: np.ndarray
    factors: LoRAFactors | None = None
    rows: Array | None = None
    energy: float = 0.0
    lost: float = 0.0
    share: float = 0.0

    def __repr__(self) -> str:
        """Table, kind and sizes, on one line."""
        form = "rows" if self.factors is None else f"factors of rank {self.factors.rank}"
        return f"TokenUpdate({self.table}, {self.kind}, {form} for {len(self.ids)} of {self.size} tokens)"

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that change."""
        return MODULES[self.table]

    @property
    def width(self) -> int:
        """D."""
        matrix = self.rows if self.factors is None else self.factors.a
        assert matrix is not None
        return matrix.shape[-1]

    @property
    def whole(self) -> bool:
        """Whether it replaces the whole matrix of the base."""
        return self.rows is not None and len(self.ids) == self.size

    def parts(self) -> Iterator[slice]:
        """Split the n rows into slices of a few thousand."""
        for start in range(0, len(self.ids), _AT_ONCE):
            yield slice(start, min(start + _AT_ONCE, len(self.ids)))

    def changed(self, old: np.ndarray, part: slice) -> np.ndarray:
        """Compute the new rows, float64 (m, D), from the base's rows (m, D) of the tokens `ids[part]`."""
        if self.rows is not None:
            return np.asarray(self.rows[part]).astype(np.float64)
        assert self.factors is not None
        b = np.asarray(self.factors.b)[part].astype(np.float64) * self.factors.scale
        return old.astype(np.float64) + b @ np.asarray(self.factors.a).astype(np.float64)

    @property
    def numbers(self) -> int:
        """The number of array elements that it holds."""
        return sum(leaf.size for leaf in jax.tree.leaves(self))

    def same_change(self, other: "TokenUpdate") -> bool:
        """Return whether both change the same rows in the same way, whichever table they belong to."""
        mine, yours = jax.tree.leaves(self), jax.tree.leaves(other)
        scales = (None if one.factors is None else one.factors.scale for one in (self, other))
        same_form = len(set(scales)) == 1 and np.array_equal(self.ids, other.ids)
        return same_form and all(map(np.array_equal, mine, yours))


def low_rank_rows(
    table: str, kind: str, size: int, ids: np.ndarray, factors: LoRAFactors, lost: float = 0.0
) -> TokenUpdate:
    """Make a low-rank change of the rows `ids` (m,) from factors a (K, D), b (m, K); unchanged rows are dropped."""
    b = np.asarray(factors.b)
    changes = b.any(axis=1)
    factors = replace(factors, b=b[changes])
    return TokenUpdate(table, kind, size, ids[changes], factors, energy=update_norm(factors) ** 2, lost=lost)


def changed_rows(table: str, kind: str, base: BaseModel, ids: np.ndarray, rows: np.ndarray) -> TokenUpdate:
    """Make a change that replaces rows of a base; rows equal to the base's in the new rows' dtype are dropped.

    `ids` is int64 (m,), ascending; `rows` is (m, D), of any float dtype.
    """
    name, size = f"{MODULES[table][0]}.weight", base.dims.vocab
    changes, energy = np.zeros(len(ids), bool), 0.0
    for part in TokenUpdate(table, kind, size, ids, rows=rows).parts():
        old = base.rows(name, ids[part])
        with np.errstate(over="ignore"):
            changes[part] = (old.astype(rows.dtype) != rows[part]).any(axis=1)
        change = rows[part][changes[part]].astype(np.float64) - old[changes[part]]
        energy += float(np.sum(change**2))
    return TokenUpdate(table, kind, size, ids[changes], rows=rows[changes].astype(np.float32), energy=energy)


def complete_rows(updates: Sequence[TokenUpdate], base: BaseModel) -> tuple[TokenUpdate, ...]:
    """Convert changes, at most one per matrix of the base, to the form in which PEFT stores them.

    Two equal changes become one if the base ties embedding and head. New rows are completed to the whole matrix if most
    of them change, or if they are for the embedding alone in a tied base, because peft also applies single rows of a
    tied embedding to the head.
    """
    if base.tied and len(updates) == 2 and updates[0].same_change(updates[1]):
        first = min(updates, key=lambda update: update.table != EMBEDDING)
        updates = [replace(first, table=TIED)]
    return tuple(_completed(update, base) for update in updates)


def _completed(update: TokenUpdate, base: BaseModel) -> TokenUpdate:
    embedding_alone = update.table == EMBEDDING and base.tied
    few = 2 * len(update.ids) <= update.size
    if update.rows is None or update.whole or (few and not embedding_alone):
        return update
    every = np.arange(update.size)
    rows = base.rows(f"{update.modules[0]}.weight", every)
    rows[update.ids] = update.rows
    return replace(update, ids=every, rows=rows)
