"""Random adapters of everything that a base can have an update of: linear modules, and all its experts."""

import numpy as np

import jcrosslora as jcl
from jcrosslora.adapter import LoRAFactors, expert_update


def adapter_of_all(base, seed: int = 0, *, experts: bool = True):
    """Make an adapter of several ranks, whose every update has about the norm of the weights of `random_model`."""
    rng = np.random.default_rng(seed)

    def pair(rank, rows, width, *count):
        a, b = rng.normal(size=(*count, rank, width)) / width**0.5, rng.normal(size=(*count, rows, rank))
        return a.astype(np.float32), b.astype(np.float32)

    modules = {}
    for place, (name, module) in enumerate(base.modules.items()):
        a, b = pair(1 + place % 3, *module.shape)
        modules[name] = LoRAFactors(a=a, b=b, scale=0.7)
    updates = []
    for layer in base.layers_with("router") if experts and base.has_experts else ():
        for rank, matrix in ((2, "down"), (3, "gate_up")):
            count, rows, width = base.experts.shape(matrix)
            updates.append(expert_update(base, layer, matrix, *pair(rank, rows, width, count)))
    return jcl.Adapter(modules, experts=tuple(updates))
