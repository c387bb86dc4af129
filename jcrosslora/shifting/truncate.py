"""Truncation of a moved update to a lower rank, or to what a file format can hold."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jcrosslora.adapter import Adapter, LoRAFactors, fuse, split_fused, update_norm
from jcrosslora.adapter.fused import Layout
from jcrosslora.adapter.truncation import RankRule, Truncation, truncate_by_rule

Modules = Mapping[str, LoRAFactors]


def truncate_update(
    adapter: Adapter, fused: Layout, rule: RankRule, norms: Mapping[str, float] | None = None
) -> tuple[Adapter, Truncation]:
    """Cut every update of an adapter, optimally, by a rule (see `truncate_by_rule`).

    Args:
        adapter: of the target, with fused matrices split.
        fused: the target's fused matrices.
        rule: the rank, or what chooses it.
        norms: ||dW||_F that the modules shall have afterwards; None leaves what the truncation makes of them.
    """
    adapter, account = reduce_fused(adapter, fused, lambda whole: truncate_by_rule(whole, rule))
    if norms is None:
        return adapter, account
    modules = {name: _rescaled(item, norms.get(name)) for name, item in adapter.modules.items()}
    return dataclasses.replace(adapter, modules=modules), account


def reduce_fused(
    adapter: Adapter, fused: Layout, reduce: Callable[[Adapter], tuple[Adapter, Truncation]]
) -> tuple[Adapter, Truncation]:
    """Apply `reduce` to an adapter of the modules that the base stores.

    Parts of a fused matrix are written as one update of it: reduced on their own, they would have a rank for each.
    """
    whole, account = reduce(Adapter(fuse(adapter.modules, fused), adapter.info))
    parts = split_fused(whole, fused).modules
    return dataclasses.replace(adapter, modules={name: parts[name] for name in adapter.modules}), account


def _rescaled(factors: LoRAFactors, norm: float | None) -> LoRAFactors:
    """Give an update a norm; one that the maps did not make has none to keep."""
    own = update_norm(factors)
    factor = norm / own if own > 0 and norm is not None else 1.0
    return LoRAFactors(a=factors.a, b=np.asarray(factors.b) * np.float32(factor))
