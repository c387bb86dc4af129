"""The heads of one layer among those of another, from which columns of o are which."""

import numpy as np

from jcrosslora.checkpoint.config import Dims


def head_rows(columns: np.ndarray, source: Dims, target: Dims) -> dict[str, np.ndarray]:
    """The rows of q, k and v, and the columns of o, of heads that go together.

    A target head is the source head that most of its columns are of. Rows of q and k stay in their order within a head,
    which rotary positions fix; those of v follow the columns of o. A key head is the one that all of its query heads
    have in the source; if they have several (heads that were averaged, say), it is none.

    Args:
        columns: (N_tgt D,), the source's column of o for every column of the target's, -1 for none.
        source: sizes of the source.
        target: sizes of the target; D is the same.

    Returns:
        "queries", "keys", "values" and "attended" of `LayerMap`.
    """
    size = target.head_dim
    heads, orders = _heads(columns.reshape(target.heads, size), source.heads)
    served, serves = target.heads // target.kv_heads, source.heads // source.kv_heads
    groups, values = np.full(target.kv_heads, -1), np.full((target.kv_heads, size), -1)
    for group in range(target.kv_heads):
        own = [head for head in range(group * served, (group + 1) * served) if heads[head] >= 0]
        of = {int(heads[head]) // serves for head in own}
        if len(of) == 1 and all((orders[head] == orders[own[0]]).all() for head in own):
            groups[group] = of.pop()
            values[group] = groups[group] * size + orders[own[0]]
    plain = np.arange(size)
    return {
        "queries": _rows(heads, plain[None, :], size),
        "keys": _rows(groups, plain[None, :], size),
        "values": values.reshape(-1),
        "attended": _rows(heads, orders, size),
    }


def _rows(heads: np.ndarray, within: np.ndarray, size: int) -> np.ndarray:
    return np.where(heads[:, None] >= 0, heads[:, None] * size + within, -1).reshape(-1)


def _heads(columns: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(N_tgt,) the source head of each target head, and (N_tgt, D) the places of its columns there."""
    size = columns.shape[1]
    heads = np.full(len(columns), -1)
    orders = np.tile(np.arange(size), (len(columns), 1))
    for head, own in enumerate(columns):
        votes = np.bincount(own[own >= 0] // size, minlength=count)
        if 2 * votes.max() <= size:
            continue
        heads[head] = votes.argmax()
        inside = own // size == heads[head]
        # Columns that were not found fill the places that are left, in order.
        free = np.setdiff1d(np.arange(size), own[inside] % size)
        if len(free) == size - np.count_nonzero(inside):
            orders[head, inside] = own[inside] % size
            orders[head, ~inside] = free
    return heads, orders
