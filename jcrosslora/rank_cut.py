"""The updates of an adapter at a lower rank."""

import dataclasses
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, LoRAFactors
from jcrosslora.linalg import recompress

A = TypeVar("A", bound=Adapter)


def cut_rank(adapter: A, rank: int | None = None) -> A:
    """The adapter with every update cut to at most `rank`, optimally in the Frobenius norm.

    None cuts to the short side of each module, at which nothing is lost; so does a rank above it.
    """
    modules = {}
    for name, factors in adapter.modules.items():
        most = min(factors.shape) if rank is None else min(rank, *factors.shape)
        modules[name] = factors if factors.rank <= most else _cut(factors, most)
    return dataclasses.replace(adapter, modules=modules)


def _cut(factors: LoRAFactors, rank: int) -> LoRAFactors:
    b, a, _ = recompress(jnp.asarray(factors.b) * factors.scale, jnp.asarray(factors.a), rank)
    return LoRAFactors(a=np.asarray(a), b=np.asarray(b))
