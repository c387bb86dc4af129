"""Which columns of one matrix are which of another, told by their values in the same rows."""

import numpy as np

# What columns have in common if one is a copy of the other that was trained on or rounded, see `method_selection`;
# with few rows chance reaches as far, and more is asked for.
_NEAR = 0.7
# What is as near as that to the column in its own place is not looked for elsewhere: heads that do nearly the same have
# 0.8 in SmolLM2-135M.
_CERTAIN = 0.95
# Chance may produce a pair as like as that once in a thousand pairs of matrices.
_BY_CHANCE = 1e-3
# Mean cosine of columns in the same order from which this order is taken although single ones are too far apart to be
# told: a mean over thousands of numbers strays by less than 0.02 from 0 where nothing connects them.
KIN = 0.2
# Share of the columns of the narrower matrix that has to be found again.
_MOST = 0.9
_AT_ONCE = 1024


def match_columns(src: np.ndarray, tgt: np.ndarray, *, search: bool = True) -> np.ndarray | None:
    """Find the source column of every target column.

    Rows are brought to one size first, so that a few large ones do not decide alone. Columns that are where they were
    stay there; the others are looked for among those that are not taken, and if there are too few, among all (a column
    that was repeated).

    Args:
        src: (R, M_src), values in R rows.
        tgt: (R, M_tgt), values in the same rows.
        search: whether to look elsewhere than at the same place; costs M_src x M_tgt x R.

    Returns:
        int64 (M_tgt,), -1 for a column that is nowhere in the source; None if most are not, of those on the narrower
        side that hold anything.
    """
    units_src, units_tgt = _units(src), _units(tgt)
    short = min(units_src.shape[1], units_tgt.shape[1])
    least = _threshold(src.shape[0], units_src.shape[1] * units_tgt.shape[1])
    found = np.full(units_tgt.shape[1], -1)
    in_place = np.einsum("rm,rm->m", units_src[:, :short], units_tgt[:, :short])
    # A column of zeros has no direction: it is the same as another of zeros, but is no evidence of anything.
    alive_src, alive_tgt = (np.asarray(units.any(axis=0)) for units in (units_src, units_tgt))
    in_place[~(alive_src[:short] | alive_tgt[:short])] = 1
    if not (alive_src.any() or alive_tgt.any()):
        return np.arange(short) if units_src.shape == units_tgt.shape else None
    found[:short] = np.where(in_place >= (max(least, _CERTAIN) if search else least), np.arange(short), -1)
    if search and (found < 0).any():
        _search(units_src, units_tgt, found, least)
    wanted = min(np.count_nonzero(alive_src), np.count_nonzero(alive_tgt))
    if wanted and np.count_nonzero(alive_tgt & (found >= 0)) >= _MOST * wanted:
        # What is too far apart to be told from chance stays where it was, if nothing else is there.
        stays = (found[:short] < 0) & (in_place >= KIN) & ~np.isin(np.arange(short), found)
        found[:short][stays] = np.flatnonzero(stays)
        return found
    # A negative one is of columns that were multiplied by a negative number.
    both = alive_src[:short] & alive_tgt[:short]
    if units_src.shape == units_tgt.shape and both.any() and abs(in_place[both].mean()) >= KIN:
        return np.arange(short)
    return None


def _search(src: np.ndarray, tgt: np.ndarray, found: np.ndarray, least: float) -> None:
    """Fill in the source columns of target columns that have none, in place."""
    taken = np.zeros(src.shape[1], bool)
    taken[found[found >= 0]] = True
    for candidates in (np.flatnonzero(~taken), np.arange(src.shape[1])):
        missing = np.flatnonzero(found < 0)
        if not (len(candidates) and len(missing)):
            continue
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            cosines = tgt[:, part].T @ src[:, candidates]
            best = cosines.argmax(axis=1)
            near = cosines[np.arange(len(part)), best] >= least
            found[part[near]] = candidates[best[near]]


def _threshold(rows: int, pairs: int) -> float:
    """The cosine from which two columns belong together: beyond what the best of all pairs has by chance.

    The cosine of two random vectors of R numbers that add up to zero is above x with a chance of at most
    (1 - x^2)^((R - 2) / 2) / 2.
    """
    freedom = max(rows - 2, 1)
    return max(_NEAR, float(np.sqrt(1 - (2 * _BY_CHANCE / pairs) ** (2 / freedom))))


def _units(matrix: np.ndarray) -> np.ndarray:
    """Columns less their mean and of norm 1, zeros where there is nothing, of rows of one size."""
    sizes = np.sqrt(np.mean(np.square(matrix), axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    columns = np.divide(matrix, sizes, out=np.zeros_like(matrix), where=sizes > 0)
    columns -= columns.mean(axis=0)
    norms = np.linalg.norm(columns, axis=0)
    # What is left of equal numbers after their mean is taken off is rounding.
    alive = norms > 1e-5 * np.sqrt(len(matrix))
    return np.where(alive, columns / np.where(alive, norms, 1), 0).astype(np.float32)
