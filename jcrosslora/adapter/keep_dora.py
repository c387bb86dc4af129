"""A DoRA in its stored form, to be written again for the base that it was trained on.

As an update it is of full rank, and read as a fit of a lower rank (see `kinds.dora`); B, A and the magnitudes are
exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jcrosslora.adapter.ignored import ignored_sentence
from jcrosslora.adapter.kinds.dora import DORA, read_stored
from jcrosslora.adapter.opening import OpenedAdapter, open_adapter
from jcrosslora.adapter.records import Adapter
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.errors import AdapterError

_LINEAR_ALONE = "a DoRA is kept with its linear layers alone"


@dataclass(frozen=True, eq=False)
class KeptDoRA:
    """A DoRA: W' = diag(m / ||W + s B A||) (W + s B A), the norm taken of each row.

    Attributes:
        directions: s B A of each module, which alone is not its update.
        magnitudes: m of each module, float32 (O,).
    """

    directions: Adapter
    magnitudes: Mapping[str, np.ndarray]


def load_dora(ref: str | Path, base: BaseModel | None = None, *, revision: str | None = None) -> KeptDoRA:
    """Read a DoRA without converting it to an update.

    Args:
        ref: a folder or a hub id, see `load_adapter`.
        base: the model that it was trained on, to check its modules against. A DoRA that was initialised as PiSSA or
            OLoRA needs it, because its B A was taken out of the weights.
        revision: branch, tag or commit of the hub repository.

    Raises:
        AdapterError: not a DoRA, damaged, or not of this base.
    """
    opened = open_adapter(ref, base, revision=revision)
    if opened.kind is not DORA:
        msg = f"{opened.name}: a {opened.kind.name} has no magnitudes that could be kept, a DoRA was wanted"
        raise AdapterError(msg + ": leave out --keep-dora")
    found = opened.by_text_name(read_stored(opened.file))
    if base is not None:
        for name, (factors, _) in found.items():
            _check_module(opened, base, name, factors.shape)
        base.release()
    changes = {kind: [tensor.module for tensor in tensors] for kind, tensors in opened.groups.extras.items()}
    if opened.groups.heads:
        changes["head"] = list(opened.groups.heads)
    # Their share of the whole change is not known without the update.
    ignored = [ignored_sentence(kind, names, None, _LINEAR_ALONE) for kind, names in changes.items()]
    opened.check_not_empty(found, ignored)
    info = opened.info(ignored=(*opened.notes, *ignored))
    directions = Adapter({name: factors for name, (factors, _) in found.items()}, info)
    return KeptDoRA(directions, {name: magnitude for name, (_, magnitude) in found.items()})


def _check_module(opened: OpenedAdapter, base: BaseModel, name: str, shape: tuple[int, int]) -> None:
    holder = next((whole for whole, parts in base.fused.items() if name in {part for part, _, _ in parts}), None)
    if holder is not None:
        msg = f"{opened.file.path}: module {name!r} is rows of {holder!r} in the base {base.name}, and a DoRA can only "
        raise AdapterError(msg + "be kept for whole modules: give the base it was trained on")
    opened.file.check_shape(name, shape, DORA.name, "is checked against its base")
