"""The mean of the adapters' parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, AdapterInfo, LoRAFactors
from jcrosslora.errors import AdapterError
from jcrosslora.shelf.composition.composition import Composition
from jcrosslora.shelf.composition.updates import Updates, read_all, write_all


@dataclass(frozen=True)
class Fusion(Composition):
    """y = y_b + (sum_i w_i s_i B_i) (sum_j w_j A_j) x: the factors are averaged, each by itself.

    So it is published; it has the rank of one adapter and depends on how each update is split into factors. The mean of
    the updates themselves is `mixture`.
    """

    name: ClassVar[str] = "fusion"
    reference: ClassVar[str] = "LoraRetriever, arXiv 2402.09997"

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Refuse adapters whose ranks differ in a module.

        Raises:
            AdapterError: they differ.
        """
        ranks: dict[str, tuple[int, str]] = {}
        for adapter in adapters:
            for name, factors in adapter.modules.items():
                rank, first = ranks.setdefault(name, (factors.rank, adapter.info.name))
                if rank != factors.rank:
                    msg = f"fusion averages factors of one rank, and {name} has rank {rank} in {first}, {factors.rank} "
                    msg += f"in {adapter.info.name}: take mixture, or write them at one rank (jcrosslora export)"
                    raise AdapterError(msg)

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Add the update of the mean factors."""
        shares = updates.shares[:, None, :, None]
        inner = jnp.sum(read_all(x, updates.a) * shares, axis=-2, keepdims=True)
        return out + write_all((inner * shares).astype(x.dtype), updates.b)

    def as_adapter(
        self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: Mapping[str, np.ndarray]
    ) -> Adapter:
        """Average the factors; a module that an adapter does not update has zeros there."""
        del arrays
        modules: dict[str, LoRAFactors] = {}
        for adapter, share in zip(adapters, shares, strict=True):
            for name, one in adapter.modules.items() if share > 0 else ():
                a, b = (np.float32(share) * np.asarray(each, np.float32) for each in (one.a, one.b))
                b = b * np.float32(one.scale)
                old = modules.get(name)
                modules[name] = LoRAFactors(a=a, b=b) if old is None else LoRAFactors(a=old.a + a, b=old.b + b)
        first = adapters[0].info
        return Adapter(modules, AdapterInfo("mean of factors", first.base_name, prefix=first.prefix))
