"""Find the channel scales that turn one base into another that computes the same.

A quantiser such as AWQ or SmoothQuant rescales channels before it rounds: it divides the gains of a norm by factors
and multiplies the columns of the modules that read it by them; it does the same to the rows of up_proj (or v_proj) and
the columns of down_proj (or o_proj). The model stays the same, and its weights become

    W_tgt = D_out W_src D_in,   D_out and D_in diagonal,

up to rounding. The update with the same effect is dW_tgt = D_out dW_src D_in.

Which scales can move follows from the blocks of a layer, see `Link`. The scales of a norm are the ratio of its gains,
which are not rounded coarsely. Those of a module are the ratio of the norms of its rows, whose rounding errors average
out. A link has scales if they bring the weights at both of its ends nearer to each other, so that training, pruning or
chance are not taken for scales.

Sources: AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438). Finding the factors in the weights is this package's
own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from jcrosslora.architectures.blocks import ROLE_PATHS, Link, module_name
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base import finite
from jcrosslora.relation.bases import Bases, Both, module_rows, some_of
from jcrosslora.relation.difference import FLOAT32_NOISE
from jcrosslora.relation.matching import MATRICES, same_form

_ROWS = 64  # sampled rows of each matrix, which the scales have to bring nearer
_ROWS_AT_ONCE = 4096
# Share of the distance that the scales may leave. Scales with a spread of 5% leave 0.89 of it under rounding to 4 bits.
_NEARER = 0.9
_HALF = {"BF16": 2.0**-9, "F16": 2.0**-12}  # relative rounding errors
_LEAST = 2.0**-8  # relative change of a gain that bfloat16 does not make
# Median change of the gains of a norm, in natural logarithms and apart from one factor on all, from which weights that
# fit the gains of one base do not fit those of the other. The scales of AWQ have 0.2 and more.
_MOST_TRAINED = 0.1


@dataclass(frozen=True, eq=False)
class ChannelScales:
    """The diagonals of D_out and D_in by module name; a module without an entry has ones.

    Routers and matrices of experts are named by `name_of`; for single experts see `expert_scales`.

    Attributes:
        rows: (O,) each, float32.
        columns: (I,) each, float32.
        gains: names of the norms and tensors whose scales were found.
        error: relative error of the scales of norms, whose gains may be stored in half precision.
        of_experts: whether experts have scales between their own matrices.
    """

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    gains: set[str] = field(default_factory=set)
    error: float = 0.0
    of_experts: bool = False

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the scales of the rows and of the columns of a module (O, I)."""
        sides = zip((self.rows, self.columns), shape, strict=True)
        rows, columns = (side.get(name, np.ones(size, np.float32)) for side, size in sides)
        return rows, columns

    def factors(self, name: str, shape: tuple[int, ...], ids: np.ndarray) -> np.ndarray:
        """Return the scales of the numbers of some rows of a module (O, I): (n, I) for n ids."""
        rows, columns = self.of(name, shape)
        return np.outer(rows[ids], columns)


def name_of(layer: int, part: str) -> str:
    """Return the full name of a `Link`'s part in a layer."""
    return module_name(layer, part) if part in ROLE_PATHS else f"model.layers.{layer}.{part}"


def find_channel_scales(source: BaseModel, target: BaseModel) -> ChannelScales | None:
    """Find the scales of a pair of bases; None if there are none, or if shapes differ.

    Reads the gains of all norms, and a sample of rows of the modules and of one expert of each layer; and all rows of
    modules that were rescaled. Raises CheckpointError if a weight cannot be read, or holds NaN or infinity.
    """
    bases = Bases(source, target)
    if not _alike(bases):
        return None
    error = _HALF.get(target.store.dtype(f"{target.family.final_norm}.weight"), 0.0)
    found = ChannelScales(error=error)
    of_experts = False
    for layer in range(target.dims.layers):
        ends = _Layer(bases, found, layer)
        for link in ends.links:
            gains = ends.gains(link.writer)
            if gains is not None:
                ends.follow_gains(link, _ratio(*gains))
            elif link.writer in MATRICES:
                of_experts |= ends.between(link, np.arange(0)) is not None
            elif link.writer in ROLE_PATHS:  # not a norm that one of two families lacks
                ends.follow_rows(link)
        bases.release()
    if of_experts or found.gains or found.rows:
        return ChannelScales(found.rows, found.columns, found.gains, error, of_experts)
    return None


def expert_scales(bases: Bases, scales: ChannelScales, layer: int, experts: tuple[int, int]) -> dict[str, Both]:
    """Return the scales of the rows and of the columns of "gate_up" and "down" of an expert of each base.

    Raises CheckpointError if a weight cannot be read, or holds NaN or infinity.
    """
    ends = _Layer(bases, scales, layer, experts)
    found = {name: scales.of(name_of(layer, name), bases.target.experts.shape(name)[1:]) for name in MATRICES}
    for link in ends.links if scales.of_experts else ():
        if link.writer not in MATRICES or link.rows is None:
            continue
        every = np.unique(link.rows)
        if (factors := ends.between(link, every)) is not None:
            (rows, inner), (outer, columns) = found[link.writer], found[link.readers[0]]
            rows, columns = rows.copy(), columns.copy()
            rows[every] *= factors
            columns /= factors[np.searchsorted(every, link.rows)]
            found = {link.writer: (rows, inner), link.readers[0]: (outer, columns)}
    bases.release()
    return found


def has_other_gains(source: BaseModel, target: BaseModel, scales: ChannelScales | None) -> bool:
    """Whether gains that `scales` do not explain differ by more than training would change them.

    False for bases of different shapes. Raises CheckpointError if a gain cannot be read.
    """
    bases = Bases(source, target)
    for layer in range(target.dims.layers if _alike(bases) else 0):
        ends = _Layer(bases, ChannelScales() if scales is None else scales, layer)
        for link in ends.links:
            gains = ends.gains(link.writer)
            if gains is not None and name_of(layer, link.writer) not in ends.scales.gains:
                sizes = np.log(np.abs(_ratio(*gains)))
                if np.median(np.abs(sizes - np.median(sizes))) > _MOST_TRAINED:
                    return True
    return False


def _alike(bases: Bases) -> bool:
    """Whether two bases have modules and experts of the same shapes, in the same layers."""
    shapes, experts = (
        [fact(base) for base in bases]
        for fact in (
            lambda base: {name: module.shape for name, module in base.modules.items()},
            lambda base: [base.layers_with("router"), base.has_experts and base.experts.block.routing.count],
        )
    )
    return shapes[0] == shapes[1] and experts[0] == experts[1] and same_form(bases)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer of two bases, and the scales found so far, to which more are added.

    Attributes:
        experts: source and target expert whose matrices are read; None takes a different one in each layer.
    """

    bases: Bases
    scales: ChannelScales
    number: int
    experts: tuple[int, int] | None = None

    @property
    def links(self) -> list[Link]:
        return self.bases.target.architecture.links(self.number)

    def gains(self, writer: str) -> Both | None:
        """Return the gains of a norm or tensor in both bases; None if one of them has none of this name and size."""
        found = [_gains(base, self.number, writer) for base in self.bases]
        return None if found[0] is None or found[1] is None or len(found[0]) != len(found[1]) else (found[0], found[1])

    def follow_gains(self, link: Link, factors: np.ndarray) -> None:
        """Add the scales that the gains of a norm show, if its readers have them."""
        if np.abs(factors - 1).max() <= _LEAST:
            return
        columns = factors if link.rows is None else factors[link.rows]
        rows = {part: self._unwritten(part) for part in link.readers}
        samples = ((src * columns, src, tgt) for src, tgt in (self._rows(*one) for one in rows.items()))
        if _nearer(samples):
            self.scales.gains.add(name_of(self.number, link.writer))
            self._multiply(link, columns)

    def follow_rows(self, link: Link) -> None:
        """Add the scales that the rows of a module show, if its readers have the inverse."""
        size = self._shape(link.writer)[0]
        every = np.arange(size) if link.rows is None else np.unique(link.rows)
        if (found := self.between(link, every)) is None:
            return
        factors = np.ones(size, np.float32)
        factors[every] = found
        self.scales.rows[name_of(self.number, link.writer)] = factors
        self._multiply(link, 1 / (factors if link.rows is None else factors[link.rows]))

    def between(self, link: Link, every: np.ndarray) -> np.ndarray | None:
        """Return the factors on rows `every` of a link's writer; None if a sample of its ends shows none."""
        rows = np.arange(self._shape(link.writer)[0]) if link.rows is None else link.rows
        some = some_of(np.unique(rows), _ROWS)
        src, tgt = self._scaled_rows(link.writer, some)
        factors = _row_factors(src, tgt)
        if not _nearer([(factors[:, None] * src, src, tgt)]):
            return None
        reached = np.flatnonzero(np.isin(rows, some))
        inverse = 1 / factors[np.searchsorted(some, rows[reached])]
        pairs = (self._rows(part, self._unwritten(part)) for part in link.readers)
        ends = ((src[:, reached], tgt[:, reached]) for src, tgt in pairs)
        if not _nearer((src * inverse, src, tgt) for src, tgt in ends):
            return None
        parts = np.array_split(every, -(-len(every) // _ROWS_AT_ONCE) or 1)
        return np.concatenate([_row_factors(*self._scaled_rows(link.writer, part)) for part in parts])

    def _multiply(self, link: Link, columns: np.ndarray) -> None:
        for part in link.readers:
            self.scales.columns[name_of(self.number, part)] = columns.astype(np.float32)

    def _shape(self, part: str) -> tuple[int, ...]:
        target = self.bases.target
        if part in ROLE_PATHS:
            return target.modules[name_of(self.number, part)].shape
        down = target.experts.shape("down")
        return (down[0], target.dims.hidden) if part == "router" else target.experts.shape(part)[1:]

    def _unwritten(self, part: str) -> np.ndarray:
        """Sample rows of a part that no link rescales."""
        rows = np.ones(self._shape(part)[0], bool)
        for link in self.links:
            if link.writer == part:
                rows[slice(None) if link.rows is None else link.rows] = False
        return some_of(np.flatnonzero(rows), _ROWS)

    def _scaled_rows(self, part: str, ids: np.ndarray) -> Both:
        """Read rows, the source's multiplied by the known column scales."""
        src, tgt = self._rows(part, ids)
        return src * self.scales.columns.get(name_of(self.number, part), np.float32(1)), tgt

    def _rows(self, part: str, ids: np.ndarray) -> Both:
        if part in ROLE_PATHS:
            read = (module_rows(base, name_of(self.number, part), ids) for base in self.bases)
        elif part == "router":
            routers = (base.experts.tensor(self.number, part)[ids] for base in self.bases)
            names = f"the router of layer {self.number}"
            read = (finite(base, names, rows) for base, rows in zip(self.bases, routers, strict=True))
        else:
            count = self.bases.target.experts.shape(part)[0]
            experts = self.experts or (self.number % count,) * 2
            read = (_expert_rows(*one, self.number, part, ids) for one in zip(self.bases, experts, strict=True))
        src, tgt = read
        return src, tgt


def _expert_rows(base: BaseModel, expert: int, layer: int, matrix: str, ids: np.ndarray) -> np.ndarray:
    """Read rows (n, I) of a matrix (O, I) of an expert, which may be stored transposed."""
    transposed = base.experts.axis(matrix) == 2
    stored = np.arange(base.experts.shape(matrix)[2]) if transposed else ids
    rows = finite(base, f"expert {expert} of layer {layer}", base.experts.rows(layer, matrix, expert, stored))
    return rows[:, ids].T if transposed else rows


def _gains(base: BaseModel, layer: int, writer: str) -> np.ndarray | None:
    """Return the gains of a norm, or of a tensor that multiplies features, float32; None if the layer has none."""
    own, norms = base.architecture.stack[layer], dict(base.architecture.norms_of(base.architecture.stack[layer]))
    if writer in own.tensors:
        return base.tensor(f"model.layers.{layer}.{own.tensors[writer].path}").astype(np.float32).reshape(-1)
    if writer not in norms:
        return None
    weight = base.tensor(f"model.layers.{layer}.{norms[writer][0]}.weight").astype(np.float32)
    with np.errstate(invalid="ignore"):  # what is not finite gets a scale of one
        return weight + np.float32(base.family.gain_offset)


def _nearer(samples: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> bool:
    """Return whether scales bring rows of the source nearer to the target's than one factor does.

    Each sample holds the scaled source rows, the source rows and the target rows.
    """
    after = before = 0.0
    for sample in samples:
        scaled, src, tgt = (x.astype(np.float64) for x in sample)
        size, squares = float(np.sum(tgt**2)) or 1.0, float(np.sum(src**2)) or 1.0
        after += float(np.sum((scaled - tgt) ** 2)) / size
        before += float(np.sum((src * float(np.sum(src * tgt)) / squares - tgt) ** 2)) / size
    return before > FLOAT32_NOISE**2 and after < _NEARER**2 * before


def _row_factors(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
    """Return the factors on the source's rows: ratios of norms, with the signs of the inner products."""
    signs = np.where(np.einsum("ij,ij->i", src, tgt) < 0, np.float32(-1), np.float32(1))
    return signs * _ratio(*(np.linalg.norm(x, axis=1) for x in (tgt, src)))


def _ratio(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return `first` / `second` in float32, one where either is zero or not finite."""
    usable = np.isfinite(first) & np.isfinite(second) & (first != 0) & (second != 0)
    return np.where(usable, first / np.where(usable, second, 1), 1).astype(np.float32)
