"""Convert a group of a transport to named arrays, for the cache and for other processes, and back."""

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
    """Return all arrays of a group by name, each with the leading axis of its pairs."""
    arrays = {
        f"term{term}_{side}_{field}": getattr(linear, field)
        for term, maps in enumerate(group.terms)
        for side, linear in zip(_SIDES, maps, strict=True)
        for field in MAP_FIELDS
    }
    return arrays | {field: getattr(group.agreement, field) for field in AGREEMENT_FIELDS}


def facts_of(group: TransportGroup) -> dict[str, Any]:
    """Return the other fields of a group as JSON values, without its pairs."""
    return {"terms": len(group.terms), "kernels": list(group.kernels)}


def group_of(pairs: tuple[Pair, ...], arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> TransportGroup:
    """Rebuild a group on the local devices."""
    placed = {name: place(array) for name, array in arrays.items()}
    terms = tuple(
        tuple(LinearMap(*(placed[f"term{term}_{side}_{field}"] for field in MAP_FIELDS)) for side in _SIDES)
        for term in range(facts["terms"])
    )
    agreement = Agreement(*(placed[field] for field in AGREEMENT_FIELDS))
    return TransportGroup(terms, agreement, pairs, tuple(facts["kernels"]))  # type: ignore[arg-type]
