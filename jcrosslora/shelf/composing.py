"""The adapters of a shelf that suit prompts, put together so that each prompt gets its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.composition import Composed, Composition, compose
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
    weights = found.weights(top)
    used = np.flatnonzero(weights.any(axis=0))
    if not len(used):  # the base alone answers everything, which one adapter at weight 0 is
        used = found.ranked()[0]
    adapters = [_named(load(found.names[place]), found.names[place]) for place in used]
    return compose(base, adapters, how, **settings), weights[:, used]


def _named(adapter: Adapter, name: str) -> Adapter:
    """Give an adapter its name on the shelf."""
    return replace(adapter, info=replace(adapter.info, name=name))
