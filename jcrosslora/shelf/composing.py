"""The adapters of a shelf that suit prompts, put together so that each prompt gets its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import AdapterError, UsageError
from jcrosslora.shelf.composition import Composed, Composition, compose
from jcrosslora.shelf.composition.registry import find_composition
from jcrosslora.shelf.retrieval.retrieved import Retrieved


def compose_found(
    found: Retrieved,
    load: Callable[[str], Adapter],
    base: BaseModel,
    how: str | Composition,
    *,
    top: int,
    **settings: Any,
) -> tuple[Composed, np.ndarray]:
    """Load and compose what a search found; see `Shelf.compose`."""
    how, weights = find_composition(how), found.weights(top)
    used = np.flatnonzero(weights.any(axis=0))
    if not len(used):
        return _base_alone(found, load, base, how, **settings), weights[:, :1]
    adapters = [named(load(found.names[place]), found.names[place]) for place in used]
    return compose(base, adapters, how, **settings), weights[:, used]


def _base_alone(
    found: Retrieved, load: Callable[[str], Adapter], base: BaseModel, how: Composition, **settings: Any
) -> Composed:
    """Compose any adapter that can be composed; at weight 0 it is the base.

    Raises:
        JCrossLoRAError: there is none, with the reason of the last one.
    """
    *others, last = found.names
    for name in others:
        with suppress(AdapterError, UsageError):
            return compose(base, [named(load(name), name)], how, **settings)
    return compose(base, [named(load(last), last)], how, **settings)


def named(adapter: Adapter, name: str) -> Adapter:
    """Give an adapter its name on the shelf."""
    return replace(adapter, info=replace(adapter.info, name=name))
