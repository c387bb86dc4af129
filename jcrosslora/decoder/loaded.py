"""Weights of bases: over which devices they are divided, and which stay in memory for one adapter after the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder.params import Params, fast_dtype, load_params

_SHARE = 0.5  # of the free memory, which kept weights may take


class LoadedBases:
    """Loads the weights of bases, and keeps those of some dtypes.

    Attributes:
        kept: the dtypes.
        mesh: of the devices that all weights are divided over; None puts them whole on the default device.
    """

    def __init__(self, kept: Collection[np.dtype] = (), mesh: Mesh | None = None) -> None:
        """Keep the weights of some dtypes until this object is dropped; by default none."""
        self.kept, self.mesh = frozenset(kept), mesh
        self._params: dict[tuple[int, np.dtype], tuple[BaseModel, Params]] = {}

    def params(self, base: BaseModel, dtype: DTypeLike = jnp.float32) -> Params:
        """Return the weights of a base; for the arguments and errors see `load_params`."""
        kind = jnp.dtype(dtype)
        if kind not in self.kept:
            return load_params(base, kind, mesh=self.mesh)
        place = id(base), kind
        if place not in self._params:
            self._params[place] = base, load_params(base, kind, mesh=self.mesh)
        return self._params[place][1]


def loaded_within(free: int | None, numbers: Sequence[int], mesh: Mesh | None = None) -> LoadedBases:
    """Plan what is kept of the bases of a fit, of which the fit itself and the check of its effect load weights.

    Args:
        free: bytes of free memory; None where that is not known, and nothing is kept.
        numbers: how many numbers of each base a device holds.
        mesh: see `LoadedBases`.
    """
    narrow, wide = fast_dtype(), np.dtype(np.float32)
    most = 0 if free is None else _SHARE * free
    fitted, checked = (kind.itemsize * sum(numbers) for kind in (narrow, wide))
    both = checked if narrow == wide else fitted + checked
    if both <= most:
        return LoadedBases((narrow, wide), mesh)
    # The check loads one base at a time beside what is kept.
    fits = narrow != wide and fitted + wide.itemsize * max(numbers) <= most
    return LoadedBases((narrow,) if fits else (), mesh)
