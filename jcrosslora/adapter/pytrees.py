"""Make pytrees of an adapter and its changes: arrays are leaves, and what decides the computation is the structure."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

T = TypeVar("T")


@dataclass(frozen=True)
class Static:
    """The parts of a node that are not leaves.

    Attributes:
        structure: what decides the computation; compared and hashed by value.
        account: provenance and figures; not compared.
    """

    structure: Any
    account: Any = field(compare=False)


def is_traced(children: Any) -> bool:
    """Tell whether a node is part of a transformed function, where one program serves many adapters."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(children))


def register_change(arrays: Sequence[str], account: Sequence[str]) -> Callable[[type[T]], type[T]]:
    """Register a dataclass as a pytree.

    Args:
        arrays: the fields that are leaves, or pytrees of them.
        account: the fields that do not belong to the structure. Inside a transformed function they have their defaults.
            The other fields are the structure; arrays among them are int64 with one axis.
    """

    def register(cls: type[T]) -> type[T]:
        names = [one.name for one in dataclasses.fields(cls)]  # type: ignore[arg-type]
        static = [name for name in names if name not in {*arrays, *account}]

        def flatten(change: T) -> tuple[tuple, Static]:
            children = tuple((jax.tree_util.GetAttrKey(name), getattr(change, name)) for name in arrays)
            structure = tuple(_hashable(getattr(change, name)) for name in static)
            return children, Static(structure, {name: getattr(change, name) for name in account})

        def unflatten(aux: Static, children: Any) -> T:
            known = {} if is_traced(children) else aux.account
            structure = dict(zip(static, map(_restored, aux.structure), strict=True))
            return cls(**dict(zip(arrays, children, strict=True)), **structure, **known)

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register


def _hashable(value: Any) -> Any:
    return np.asarray(value, np.int64).tobytes() if isinstance(value, np.ndarray) else value


def _restored(value: Any) -> Any:
    return np.frombuffer(value, np.int64) if isinstance(value, bytes) else value
