"""Match dimensions of two bases by columns of matrices with corresponding rows, heads by o_proj, experts by routers."""

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base import finite
from jcrosslora.checkpoint.config import Dims
from jcrosslora.relation.bases import Bases, cosine_similarity, some_of
from jcrosslora.utils.picking import evenly_spaced

# Least cosine of a column with its trained or rounded copy, see `relation`. Columns of few rows reach it by chance, so
# `_threshold` raises it for them.
_MIN_COSINE = 0.7
# Cosine with the column at the same index from which no other index is searched: nearly equivalent heads of
# SmolLM2-135M have 0.8.
_SURE_COSINE = 0.95
# Allowed chance per pair of matrices that two unrelated columns reach the threshold.
_FALSE_MATCHES = 1e-3
# Mean cosine of columns at equal indices from which the same order is assumed although single columns are too far apart
# to be matched. The mean over thousands of numbers of unrelated matrices stays below 0.02.
MIN_MEAN_COSINE = 0.2
# Share of the columns of the narrower matrix that has to be matched.
_MIN_MATCHED = 0.9
_BATCH = 1024
MATRICES = ("gate_up", "down")
_CHECKED, _ROWS = 4, 8  # experts whose weights are compared, and rows of each matrix


def match_columns(src: np.ndarray, tgt: np.ndarray, *, search: bool = True) -> np.ndarray | None:
    """Find the source column of every target column.

    Rows are normalised first, so that a few large ones do not dominate. Columns at the same index are preferred. The
    remaining ones are searched among the source columns that are not taken, then among all (repeated columns).

    `src` is (R, M_src) and `tgt` (R, M_tgt), in the same R rows. Without `search` only columns at the same index are
    compared; the search costs M_src x M_tgt x R. Returns int64 (M_tgt,), -1 for a column without a source column; None
    if fewer than 90% of the non-zero columns of the narrower side are matched.
    """
    units_src, units_tgt = _unit_columns(src), _unit_columns(tgt)
    short = min(units_src.shape[1], units_tgt.shape[1])
    least = _threshold(src.shape[0], units_src.shape[1] * units_tgt.shape[1])
    found = np.full(units_tgt.shape[1], -1)
    in_place = np.einsum("rm,rm->m", units_src[:, :short], units_tgt[:, :short])
    # A zero column has no direction: it matches another zero column, but is no evidence of a relation.
    nonzero_src, nonzero_tgt = (np.asarray(units.any(axis=0)) for units in (units_src, units_tgt))
    in_place[~(nonzero_src[:short] | nonzero_tgt[:short])] = 1
    if not (nonzero_src.any() or nonzero_tgt.any()):
        return np.arange(short) if units_src.shape == units_tgt.shape else None
    found[:short] = np.where(in_place >= (max(least, _SURE_COSINE) if search else least), np.arange(short), -1)
    if search and (found < 0).any():
        _search(units_src, units_tgt, found, least)
    wanted = min(np.count_nonzero(nonzero_src), np.count_nonzero(nonzero_tgt))
    if wanted and np.count_nonzero(nonzero_tgt & (found >= 0)) >= _MIN_MATCHED * wanted:
        # An unmatched column keeps its index if its cosine there is clear and nothing else is matched to it.
        stays = (found[:short] < 0) & (in_place >= MIN_MEAN_COSINE) & ~np.isin(np.arange(short), found)
        found[:short][stays] = np.flatnonzero(stays)
        return found
    # A negative mean cosine comes from columns that were multiplied by a negative number.
    both = nonzero_src[:short] & nonzero_tgt[:short]
    if units_src.shape == units_tgt.shape and both.any() and abs(in_place[both].mean()) >= MIN_MEAN_COSINE:
        return np.arange(short)
    return None


def _search(src: np.ndarray, tgt: np.ndarray, found: np.ndarray, least: float) -> None:
    """Fill in the source columns of unmatched target columns, in place."""
    taken = np.zeros(src.shape[1], bool)
    taken[found[found >= 0]] = True
    for candidates in (np.flatnonzero(~taken), np.arange(src.shape[1])):
        missing = np.flatnonzero(found < 0)
        if not (len(candidates) and len(missing)):
            continue
        for start in range(0, len(missing), _BATCH):
            part = missing[start : start + _BATCH]
            cosines = tgt[:, part].T @ src[:, candidates]
            best = cosines.argmax(axis=1)
            near = cosines[np.arange(len(part)), best] >= least
            found[part[near]] = candidates[best[near]]


def _threshold(rows: int, pairs: int) -> float:
    """Return the cosine that the best of all pairs of unrelated columns exceeds with a chance of `_FALSE_MATCHES`.

    The cosine of two random vectors of R numbers that sum to zero exceeds x with a chance of at most
    (1 - x^2)^((R - 2) / 2) / 2.
    """
    freedom = max(rows - 2, 1)
    return max(_MIN_COSINE, float(np.sqrt(1 - (2 * _FALSE_MATCHES / pairs) ** (2 / freedom))))


def _unit_columns(matrix: np.ndarray) -> np.ndarray:
    """Normalise the rows to RMS 1, then the columns to mean 0 and norm 1; constant columns become zeros."""
    sizes = np.sqrt(np.mean(np.square(matrix), axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    columns = np.divide(matrix, sizes, out=np.zeros_like(matrix), where=sizes > 0)
    columns -= columns.mean(axis=0)
    norms = np.linalg.norm(columns, axis=0)
    # Equal numbers less their mean leave rounding errors.
    nonzero = norms > 1e-5 * np.sqrt(len(matrix))
    return np.where(nonzero, columns / np.where(nonzero, norms, 1), 0).astype(np.float32)


def match_heads(columns: np.ndarray, source: Dims, target: Dims) -> dict[str, np.ndarray]:
    """Find the source rows of q, k and v, and the source columns of o, for every target head.

    A target head corresponds to the source head that most of its columns come from. Rows of q and k keep their order
    within a head, which rotary positions fix; rows of v follow the columns of o. A key-value head corresponds to the
    one that serves all of its query heads in the source; if there are several (averaged heads), to none.

    `columns` (N_tgt D,) holds the source column of every column of the target's o_proj, -1 for none; heads of both have
    D features. Returns "queries", "keys", "values" and "attended" of a `LayerMap`.
    """
    size = target.head_dim
    heads, orders = _heads(columns.reshape(target.heads, size), source.heads)
    group_tgt, group_src = target.heads // target.kv_heads, source.heads // source.kv_heads
    kv_heads, values = np.full(target.kv_heads, -1), np.full((target.kv_heads, size), -1)
    for kv_head in range(target.kv_heads):
        served = [head for head in range(kv_head * group_tgt, (kv_head + 1) * group_tgt) if heads[head] >= 0]
        candidates = {int(heads[head]) // group_src for head in served}
        if len(candidates) == 1 and all((orders[head] == orders[served[0]]).all() for head in served):
            kv_heads[kv_head] = candidates.pop()
            values[kv_head] = kv_heads[kv_head] * size + orders[served[0]]
    in_order = np.arange(size)[None, :]
    return {
        "queries": _rows(heads, in_order, size),
        "keys": _rows(kv_heads, in_order, size),
        "values": values.reshape(-1),
        "attended": _rows(heads, orders, size),
    }


def _rows(heads: np.ndarray, within: np.ndarray, size: int) -> np.ndarray:
    return np.where(heads[:, None] >= 0, heads[:, None] * size + within, -1).reshape(-1)


def _heads(columns: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (N_tgt,) the source head of each target head, and (N_tgt, D) the indices of its columns in that head."""
    size = columns.shape[1]
    heads = np.full(len(columns), -1)
    orders = np.tile(np.arange(size), (len(columns), 1))
    for head, own in enumerate(columns):
        votes = np.bincount(own[own >= 0] // size, minlength=count)
        if 2 * votes.max() <= size:
            continue
        heads[head] = votes.argmax()
        inside = own // size == heads[head]
        # Unmatched columns fill the remaining indices in order.
        free = np.setdiff1d(np.arange(size), own[inside] % size)
        if len(free) == size - np.count_nonzero(inside):
            orders[head, inside] = own[inside] % size
            orders[head, ~inside] = free
    return heads, orders


def same_form(bases: Bases) -> bool:
    """Whether neither base has experts, or both have experts of the same shape and storage layout."""
    source, target = (
        [(base.experts.shape(matrix)[1:], base.experts.axis(matrix)) for matrix in MATRICES]
        if base.layers_with("router")
        else None
        for base in bases
    )
    return source == target


def match_experts(bases: Bases, layers: tuple[int, int], *, alike: bool = False) -> np.ndarray:
    """Find the source expert of every target expert of a layer of the source and one of the target.

    Both bases have experts of the `same_form`; the weights are checked by `finite`. `alike` states that the
    experts are the source's, perhaps rescaled; then only routers are compared. Returns int64 (E_tgt,), -1 for an expert
    without a counterpart.
    """
    router_src, router_tgt = (
        finite(base, f"the router of layer {layer}", base.experts.tensor(layer, "router"))
        for base, layer in zip(bases, layers, strict=True)
    )
    nothing = np.full(len(router_tgt), -1)
    found = match_columns(router_src.T, router_tgt.T)
    if found is None:  # other routers, perhaps of the same experts
        found = np.arange(len(router_tgt)) if len(router_src) == len(router_tgt) else nothing
    if alike:
        return found
    cosines = [
        cosine_similarity(*expert_rows(bases, layers, (int(found[expert]), int(expert)), matrix, _ROWS))
        for expert in some_of(np.flatnonzero(found >= 0), _CHECKED)
        for matrix in MATRICES
    ]
    return found if cosines and np.mean(cosines) >= MIN_MEAN_COSINE else nothing


def expert_rows(
    bases: Bases, layers: tuple[int, int], experts: tuple[int, int], matrix: str, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Read at most `count` evenly spaced rows of a matrix of one expert of each base, as stored: float32 (n, columns).

    The rows are checked by `finite`.
    """

    def read(base: BaseModel, layer: int, expert: int) -> np.ndarray:
        rows = evenly_spaced(base.experts.shape(matrix)[base.experts.axis(matrix)], count)
        return finite(base, f"expert {expert} of layer {layer}", base.experts.rows(layer, matrix, expert, rows))

    src, tgt = map(read, bases, layers, experts)
    return src, tgt
