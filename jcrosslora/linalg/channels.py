"""Scales of rows and columns by which one weight becomes another.

A quantiser such as AWQ or SmoothQuant moves factors between modules before it rounds them: it divides the gain of a
norm by them, and multiplies the columns of the modules behind it; or it divides the rows of one module, and multiplies
the columns of the next. The model stays the same, and its weights become

    W_tgt = D_out W_src D_in,   D_out and D_in diagonal,

up to rounding. So does the update that has the same effect: dW_tgt = D_out dW_src D_in.

Sources: AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438). Finding the factors in the weights is this package's
own.
"""

from typing import Any

from jcrosslora.linalg.low_rank import namespace

_SWEEPS = 10  # over columns and rows in turn: each divides the error by about the number of rows
# Share of the distance that the scales may leave. Chance leaves 0.99 of it with 64 rows, and rounding to 4 bits after
# scales with a spread of 15% leaves 0.55.
_CLOSER = 0.8
_EQUAL = 1e-5  # relative distance up to which nothing but float32 rounding differs


def channel_scales(src: Any, tgt: Any, columns: Any = None) -> tuple[Any, Any]:
    """Find the scales of rows (O,) and columns (I,) that bring W_src nearest to W_tgt, both (O, I).

    They minimise ||W_tgt - D_out W_src D_in||_F, by least squares for columns and rows in turn. `columns` gives those
    that are known, such as the ratio of the gains of a norm, which rounding did not touch. All scales are exactly one
    unless they explain much of the distance that one scale leaves. Takes arrays of numpy or JAX, and returns the same.
    """
    xp = namespace(src)
    rows = xp.ones(src.shape[0], src.dtype)
    if columns is None:
        for _ in range(_SWEEPS):
            columns = _ratio(rows[:, None] * src, tgt, 0)
            rows = _ratio(src * columns, tgt, 1)
    else:
        rows = _ratio(src * columns, tgt, 1)
    scale = _ratio(src.reshape(-1), tgt.reshape(-1), 0)
    apart, as_one = (xp.linalg.norm(one - tgt) for one in (rescale(src, rows, columns), scale * src))
    follows = (apart < _CLOSER * as_one) & (as_one > _EQUAL * xp.linalg.norm(tgt))
    return xp.where(follows, rows, 1), xp.where(follows, columns, 1)


def gain_ratio(src: Any, tgt: Any) -> Any:
    """Return the scales of the columns behind a norm whose gain (I,) was divided by them; one where nothing is left."""
    xp = namespace(src)
    return xp.where(tgt == 0, 1, src / xp.where(tgt == 0, 1, tgt))


def rescale(weight: Any, rows: Any, columns: Any) -> Any:
    """Return D_out W D_in."""
    return rows[:, None] * weight * columns


def _ratio(src: Any, tgt: Any, axis: int) -> Any:
    """Return the factors of the vectors along an axis that bring `src` nearest to `tgt`; one for a zero vector."""
    xp = namespace(src)
    squares = xp.sum(src * src, axis=axis)
    return xp.where(squares > 0, xp.sum(src * tgt, axis=axis) / xp.where(squares > 0, squares, 1), 1)
