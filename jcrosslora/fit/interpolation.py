"""Part of the way from a further-trained target back to the source, as low-rank updates beside those of a copy.

Further training has made W_tgt = W_src + T of the source's weights. What T and an adapter's dW have in common a copy
does twice, W_src + T + dW, and overshoots: the more alike the two trainings, the worse. A share of T is therefore taken
off again while the adapter is on, which puts it on weights between the two bases, W_src + (1 - share) T + dW.

Sources: interpolation of the weights of a model and its fine-tuned version (WiSE-FT, arXiv 2109.01903); negated task
vectors (arXiv 2212.04089). That a copied adapter goes with them is this package's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import LoRAFactors
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.evidence.weight_stacks import bounded_groups, load_stack
from jcrosslora.linalg import decompose
from jcrosslora.utils.progress import track

# Of the way that is taken.
SHARE = 0.75
# Of each module's ||T||_F^2 in the rank that it is written at, where that is not bounded.
ENERGY = 0.99


@dataclass(frozen=True)
class SourceInterpolation:
    """The source interpolation, low rank.

    Attributes:
        modules: module -> share (W_src - W_tgt), cut; modules that both bases have alike are left out.
        kept: share of ||W_src - W_tgt||_F^2, over all modules, that the ranks hold; 1 where nothing differs.
    """

    modules: Mapping[str, LoRAFactors]
    kept: float


def check_share(share: float) -> None:
    """Refuse a share of the way that is none.

    Raises:
        UsageError: below 0 or above 1, or no number.
    """
    if not 0 <= share <= 1:
        msg = f"interpolation {share:g} is out of range; it must be from 0 (a copy) to 1 (all the way to the source)"
        raise UsageError(msg)


def interpolate_to_source(
    source: BaseModel, target: BaseModel, share: float, *, rank: int, progress: bool = False
) -> SourceInterpolation:
    """What a share of the source interpolation to the source changes of each module of the target.

    Each difference is cut to the lowest rank that holds `ENERGY` of it, and to `rank` at most. What a LoRA has changed
    is of its rank; what training of all weights has changed may not be held by any small one, and `kept` says so.

    Args:
        source: the base that adapters come from.
        target: a base with the same modules, by name and shape.
        share: of the way, 0 to 1.
        rank: the highest rank.
        progress: whether to show a progress bar.

    Raises:
        UsageError: a share out of range.
        MethodError: the modules of the two bases are not the same.
        CheckpointError: a weight cannot be read or is not finite.
    """
    check_share(share)
    shapes = [{name: module.shape for name, module in base.modules.items()} for base in (source, target)]
    if shapes[0] != shapes[1]:
        odd = next(name for name in {**shapes[1], **shapes[0]} if shapes[0].get(name) != shapes[1].get(name))
        msg = f"there is no source interpolation from {target.name} to {source.name}, which differ in {odd}: bases with the same "
        raise MethodError(msg + "modules were wanted; use another method than interpolated-copy")
    modules: dict[str, LoRAFactors] = {}
    whole = left = 0.0
    with track(len(target.modules), "interpolate", "modules", show=progress) as bar:
        for names in bounded_groups(
            list(target.modules), shapes[1].__getitem__, lambda name: 8 * prod(shapes[1][name])
        ):
            src, tgt = load_stack(source, names), load_stack(target, names)
            found, energies = _cut(src - tgt, rank)
            for name, one, (of, held) in zip(names, found, energies, strict=False):
                whole, left = whole + of, left + held
                if one.rank and share:
                    modules[name] = LoRAFactors(a=one.a, b=one.b * np.float32(share))
            bar.update(len(names))
    return SourceInterpolation(
        {name: modules[name] for name in target.modules if name in modules}, left / whole if whole else 1.0
    )


def _cut(stack: jax.Array, rank: int) -> tuple[list[LoRAFactors], list[tuple[float, float]]]:
    """Factors of each matrix of (L, O, I), and its squared norm before and after the cut."""
    # Any vectors do that hold the energy, however little they differ from others: nothing has to be done again.
    svd, _ = decompose(stack, min(rank, *stack.shape[1:]), vectors=False, tolerance=float("inf"))
    wholes = np.asarray(jnp.sum(stack**2, axis=(1, 2)), np.float64)
    u, s, v = (np.asarray(field) for field in (svd.u, svd.s, svd.v))
    factors, energies = [], []
    for place, whole in enumerate(wholes):
        held = np.cumsum(s[place].astype(np.float64) ** 2)
        count = min(int(np.searchsorted(held, ENERGY * whole)) + 1, len(held)) if whole > 0 else 0
        b, a = u[place][:, :count] * s[place][:count], v[place][:, :count].T
        factors.append(LoRAFactors(a=np.ascontiguousarray(a), b=np.ascontiguousarray(b)))
        energies.append((float(whole), min(float(held[count - 1]), float(whole)) if count else 0.0))
    return factors, energies
