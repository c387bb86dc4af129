"""SD-LoRA: a sequence of tasks, whose earlier updates are directions of unit size with magnitudes.

    dW = sum over i < t of a_i B_i A_i / (||B_i||_F ||A_i||_F)  +  a_t s_t B_t A_t

Its repository trains vision transformers and saves every task as a pickle, which is not read. The input here is one
plain adapter a task, and the magnitudes.

Source: SD-LoRA (https://openreview.net/forum?id=5U1rlpX68A).
"""

import math
from collections.abc import Sequence

import numpy as np

from jcrosslora.adapter.combining import NO_SUM, add_factors
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.ignored import Carried, check_always_active, restrict
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.errors import UsageError

_WHY = "tasks are combined in their linear modules alone"


def stack_tasks(adapters: Sequence[Adapter], magnitudes: Sequence[float]) -> Adapter:
    """Combine the updates of a sequence of tasks into one adapter; the ranks of a module add up.

    Args:
        adapters: of one base, in the order in which they were trained.
        magnitudes: a_i of each; the last one multiplies its update without normalisation.

    Returns:
        The adapter, float32 and scale 1. A module of some tasks only is the sum over these; changes of embedding and
        head are listed in `info.ignored`.

    Raises:
        UsageError: no adapters, another number of magnitudes than of adapters, or one that is not finite.
        AdapterError: updates of a module have different shapes, or an adapter is active only after certain tokens.
    """
    if not adapters or len(magnitudes) != len(adapters) or not all(map(math.isfinite, magnitudes)):
        msg = (
            f"{len(adapters)} adapters and magnitudes {list(magnitudes)}; give at least one adapter, and a number for "
        )
        msg += "each"
        raise UsageError(msg)
    for adapter in adapters:
        check_always_active(adapter, NO_SUM)
    terms: dict[str, list[LoRAFactors]] = {}
    for place, (adapter, magnitude) in enumerate(zip(adapters, magnitudes, strict=True)):
        for name, factors in adapter.modules.items():
            last = place == len(adapters) - 1
            terms.setdefault(name, []).append(_term(factors, magnitude, last=last))
    info = AdapterInfo(
        name=" + ".join(one.info.name for one in adapters),
        base_name=adapters[-1].info.base_name,
        ignored=tuple(sentence for one in adapters for sentence in restrict(one, Carried.LINEAR, _WHY).info.ignored),
    )
    return Adapter(modules={name: add_factors(name, found) for name, found in terms.items()}, info=info)


def _term(factors: LoRAFactors, magnitude: float, *, last: bool) -> LoRAFactors:
    a, b = (np.asarray(matrix).astype(np.float64) for matrix in (factors.a, factors.b))
    if last:
        gain = magnitude * factors.scale
    else:
        size = float(np.linalg.norm(b) * np.linalg.norm(a))
        # A task with a zero update has no direction.
        gain = magnitude * math.copysign(1.0, factors.scale) / size if size > 0 else 0.0
    return LoRAFactors(a=a.astype(np.float32), b=(gain * b).astype(np.float32))
