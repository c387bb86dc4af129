"""A group of a transport taken apart into named arrays, to be stored or sent, and put together again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jcrosslora.alignment.agreement import Agreement
from jcrosslora.alignment.transport import TransportGroup
from jcrosslora.linalg import LinearMap, place
from jcrosslora.lineage.pairing import Pair

MAP_FIELDS = tuple(field.name for field in dataclasses.fields(LinearMap))
AGREEMENT_FIELDS = tuple(field.name for field in dataclasses.fields(Agreement))
_SIDES = ("out", "in")


def arrays_of(group: TransportGroup) -> dict[str, jax.Array]:
    """All arrays of a group by name, each with the leading axis of its pairs."""
    arrays = {
        f"term{term}_{side}_{field}": getattr(linear, field)
        for term, maps in enumerate(group.terms)
        for side, linear in zip(_SIDES, maps, strict=True)
        for field in MAP_FIELDS
    }
    return arrays | {field: getattr(group.agreement, field) for field in AGREEMENT_FIELDS}


def facts_of(group: TransportGroup) -> dict[str, Any]:
    """What else a group holds beside its pairs, in JSON values."""
    return {"terms": len(group.terms), "kernels": list(group.kernels)}


def group_of(pairs: tuple[Pair, ...], arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> TransportGroup:
    """The group that was taken apart, on the local devices."""
    placed = {name: place(array) for name, array in arrays.items()}
    terms = tuple(
        tuple(LinearMap(*(placed[f"term{term}_{side}_{field}"] for field in MAP_FIELDS)) for side in _SIDES)
        for term in range(facts["terms"])
    )
    agreement = Agreement(*(placed[field] for field in AGREEMENT_FIELDS))
    return TransportGroup(terms, agreement, pairs, tuple(facts["kernels"]))  # type: ignore[arg-type]
