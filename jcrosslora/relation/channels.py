"""Find the scales of channels by which one base is another that computes the same.

A quantiser such as AWQ or SmoothQuant changes scales before it rounds: it divides the gain of a norm by some factors,
and multiplies the columns of the modules behind it; and it divides the rows of up_proj (or v_proj) by some, and
multiplies the columns of down_proj (or o_proj). The model stays the same, and its weights become

    W_tgt = D_out W_src D_in,   D_out and D_in diagonal,

up to rounding. So does the update of a module that has the same effect: dW_tgt = D_out dW_src D_in.

The scales behind a norm are the ratio of its gains, which are not rounded coarsely. Those between two modules are the
ratio of the norms of the first one's rows, whose rounding errors average out. Both are only used if they bring the
weights nearer to each other, so that training, pruning or chance are not taken for scales.

Sources: AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438). Finding the factors in the weights is this package's
own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from jcrosslora.architectures.blocks import DENSE_ROLES, READERS
from jcrosslora.checkpoint import BaseModel
from jcrosslora.relation.bases import Bases, module_rows, modules_of
from jcrosslora.utils.spread import evenly_spaced

# Modules whose rows are divided by what the columns of the other are multiplied by.
_BETWEEN = {"up_proj": "down_proj", "v_proj": "o_proj"}
_LAYERS, _ROWS = 4, 64  # layers and rows whose weights have to be nearer to each other
# Share of the distance that the scales may leave. Scales with a spread of 5% leave 0.89 of it under rounding to 4 bits.
_NEARER = 0.9
_HALF = {"BF16": 2.0**-9, "F16": 2.0**-12}  # relative rounding errors
_LEAST = 2.0**-8  # relative change of a gain that bfloat16 does not make


@dataclass(frozen=True, eq=False)
class ChannelScales:
    """The diagonals of D_out and D_in by the names of modules; a module that is not named has ones.

    Attributes:
        rows: (O,) each, float32.
        columns: (I,) each, float32.
        error: relative, of the scales behind norms, whose gains may be stored in half precision.
    """

    rows: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]
    error: float = 0.0

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the scales of the rows and of the columns of a module (O, I)."""
        sides = zip((self.rows, self.columns), shape, strict=True)
        rows, columns = (side.get(name, np.ones(size, np.float32)) for side, size in sides)
        return rows, columns

    def factors(self, name: str, shape: tuple[int, ...], ids: np.ndarray) -> np.ndarray:
        """Return the scales of the numbers of some rows of a module (O, I): (n, I) for n ids."""
        rows, columns = self.of(name, shape)
        return np.outer(rows[ids], columns)


def find_channel_scales(source: BaseModel, target: BaseModel) -> ChannelScales | None:
    """Find the scales of a pair of bases; None if there are none, or if shapes differ.

    Of bases with other layers than attention and dense MLPs none are looked for. Reads the gains of all norms; if these
    differ, a sample of rows; and if the gains explain how the rows differ, up_proj and v_proj of all layers. Raises
    CheckpointError if a weight cannot be read, or holds NaN or infinity.
    """
    bases = Bases(source, target)
    shapes = [{name: module.shape for name, module in base.modules.items()} for base in bases]
    roles = {module.role for module in target.modules.values()}
    if shapes[0] != shapes[1] or not roles <= set(DENSE_ROLES) or any(base.has_experts for base in bases):
        return None
    columns = {
        name: _ratio(*(base.residual_gain(name) for base in bases))
        for name, module in target.modules.items()
        if module.role in READERS
    }
    if all(np.abs(one - 1).max() <= _LEAST for one in columns.values()):
        return None
    # Rows of modules in front of others may have scales too, which are not known yet.
    sampled = [name for role in READERS if role not in _BETWEEN for name in modules_of(target, role, _LAYERS)]
    found = ChannelScales({}, columns, _HALF.get(target.store.dtype(f"{target.family.final_norm}.weight"), 0.0))
    if not _nearer(bases, sampled, found):
        return None
    for first, second in _BETWEEN.items():
        if first == "up_proj" and "gate_proj" not in roles:
            continue  # an activation function is between the two
        more = _between(bases, first, second, columns)
        both = replace(found, rows={**found.rows, **more.rows}, columns={**found.columns, **more.columns})
        names = [name for role in (first, second) for name in modules_of(target, role, _LAYERS)]
        if more.rows and _nearer(bases, names, both, found):
            found = both
    bases.release()
    return found


def _between(bases: Bases, first: str, second: str, columns: Mapping[str, np.ndarray]) -> ChannelScales:
    """Return the scales of the rows of a role, and the columns of another, from the norms of the rows."""
    rows, inner = {}, {}
    for name, module in bases.target.modules.items():
        other = name.replace(first, second)
        if module.role != first or other not in bases.target.modules:
            continue
        every = np.arange(module.shape[0])
        src, tgt = (module_rows(base, name, every) for base in bases)
        factors = _ratio(*(np.linalg.norm(x, axis=1) for x in (tgt, src * columns[name])))
        served, rest = divmod(bases.target.modules[other].shape[1], len(factors))  # query heads of a key-value head
        if rest:
            continue
        size = bases.target.dims.head_dim if served > 1 else len(factors)
        rows[name] = factors
        inner[other] = (1 / np.repeat(factors.reshape(-1, size), served, axis=0)).reshape(-1)
        bases.release()
    return ChannelScales(rows, inner)


def _nearer(bases: Bases, names: Iterable[str], scales: ChannelScales, than: ChannelScales | None = None) -> bool:
    """Return whether scales bring sampled rows of the source nearer to the target's than one factor, or others, do."""
    after = before = 0.0
    for name in names:
        shape = bases.target.modules[name].shape
        ids = evenly_spaced(shape[0], _ROWS)
        src, tgt = (module_rows(base, name, ids).astype(np.float64) for base in bases)
        plain = src if than is None else src * than.factors(name, shape, ids)
        size = float(np.sum(tgt**2)) or 1.0
        squares = float(np.sum(plain**2)) or 1.0
        before += float(np.sum((plain * float(np.sum(plain * tgt)) / squares - tgt) ** 2)) / size
        after += float(np.sum((src * scales.factors(name, shape, ids) - tgt) ** 2)) / size
    bases.release()
    return after < _NEARER**2 * before


def _ratio(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return `first` / `second` in float32, one where either is zero or not finite."""
    usable = np.isfinite(first) & np.isfinite(second) & (first != 0) & (second != 0)
    return np.where(usable, first / np.where(usable, second, 1), 1).astype(np.float32)
