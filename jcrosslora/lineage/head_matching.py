"""Match the attention heads of two layers by the matched columns of o_proj."""

import numpy as np

from jcrosslora.checkpoint.config import Dims


def match_heads(columns: np.ndarray, source: Dims, target: Dims) -> dict[str, np.ndarray]:
    """Find the source rows of q, k and v, and the source columns of o, for every target head.

    A target head corresponds to the source head that most of its columns come from. Rows of q and k keep their order
    within a head, which rotary positions fix; rows of v follow the columns of o. A key-value head corresponds to the
    one that serves all of its query heads in the source; if there are several (averaged heads), to none.

    Args:
        columns: (N_tgt D,), the source column of every column of the target's o_proj, -1 for none.
        source: sizes of the source.
        target: sizes of the target, with the same D.

    Returns:
        "queries", "keys", "values" and "attended" of a `LayerMap`.
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
    """Return (N_tgt,) the source head of each target head, and (N_tgt, D) the places of its columns in that head."""
    size = columns.shape[1]
    heads = np.full(len(columns), -1)
    orders = np.tile(np.arange(size), (len(columns), 1))
    for head, own in enumerate(columns):
        votes = np.bincount(own[own >= 0] // size, minlength=count)
        if 2 * votes.max() <= size:
            continue
        heads[head] = votes.argmax()
        inside = own // size == heads[head]
        # Unmatched columns fill the remaining places in order.
        free = np.setdiff1d(np.arange(size), own[inside] % size)
        if len(free) == size - np.count_nonzero(inside):
            orders[head, inside] = own[inside] % size
            orders[head, ~inside] = free
    return heads, orders
