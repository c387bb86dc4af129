"""How large an update is, and what an adapter holds, as a table by role; the update itself is never formed."""

import math
from collections import defaultdict

import numpy as np

from jcrosslora.adapter.names import natural_key
from jcrosslora.adapter.records import Adapter, LoRAFactors


def update_norm(factors: LoRAFactors) -> float:
    """||scale B A||_F in float64, from the K x K Gram matrices: ||B A||^2 = sum(B'B * AA')."""
    a, b = (np.asarray(matrix).astype(np.float64) for matrix in (factors.a, factors.b))
    # Rounding can leave a product of factors that cancel just below zero.
    return abs(factors.scale) * math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))


def describe_adapter(adapter: Adapter) -> list[dict[str, str]]:
    """One row of text for each role, in the order in which roles first occur.

    Columns: the role (last part of the module's name), the number of modules, the (O, I), ranks and scales that
    occur, and the Frobenius norm of all updates of the role together.
    """
    groups: dict[str, list[LoRAFactors]] = defaultdict(list)
    for name in sorted(adapter.modules, key=natural_key):
        groups[name.rpartition(".")[2]].append(adapter.modules[name])
    return [_row(role, members) for role, members in groups.items()]


def _row(role: str, members: list[LoRAFactors]) -> dict[str, str]:
    return {
        "module": role,
        "n": str(len(members)),
        "out x in": ", ".join(f"{rows} x {columns}" for rows, columns in sorted({item.shape for item in members})),
        "rank": ", ".join(map(str, sorted({item.rank for item in members}))),
        "scale": ", ".join(f"{scale:.4g}" for scale in sorted({item.scale for item in members})),
        "norm of dW": f"{math.hypot(*(update_norm(item) for item in members)):.4g}",
    }
