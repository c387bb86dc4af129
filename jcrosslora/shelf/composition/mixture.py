"""The mean of the adapters' outputs."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.combining import add_adapters
from jcrosslora.shelf.composition.composition import Composition


@dataclass(frozen=True)
class Mixture(Composition):
    """y = y_b + sum_i w_i B_i A_i x, with the weights of a prompt divided by their sum."""

    name: ClassVar[str] = "mixture"
    reference: ClassVar[str] = "LoraRetriever, arXiv 2402.09997"

    def as_adapter(
        self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: Mapping[str, np.ndarray]
    ) -> Adapter:
        """Put the factors of the adapters side by side; the ranks add up."""
        del arrays
        used = [scaled(adapter, share) for adapter, share in zip(adapters, shares, strict=True) if share > 0]
        return add_adapters(used)


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """Multiply all updates of an adapter."""
    modules = {
        name: dataclasses.replace(factors, scale=factors.scale * float(factor))
        for name, factors in adapter.modules.items()
    }
    return dataclasses.replace(adapter, modules=modules)
