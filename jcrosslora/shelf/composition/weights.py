"""The weights of the adapters for each prompt, as they are given."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from jcrosslora.errors import UsageError
from jcrosslora.shelf.composition.composition import Composition
from jcrosslora.text import Prompt

# (P, N) for P prompts and N adapters, or (N,) for all prompts; or a function of the prompts that returns one of them,
# such as a retrieval. None is 1 for every adapter.
Weights: TypeAlias = ArrayLike | Callable[[Sequence[Prompt]], ArrayLike] | None


def shares_of(how: Composition, weights: Weights, prompts: Sequence[Prompt], count: int) -> np.ndarray:
    """Return the shares of N adapters for each of P prompts, float32 (P, N), see `Composition.shares`.

    Raises:
        UsageError: another shape, a weight that is negative or no number, or none where the composition needs them.
    """
    if weights is None and how.needs_weights and count > 1:
        msg = f"{how.name} with {count} adapters and no weights: give a weight of each, such as 1 for the one to use "
        raise UsageError(msg + "and 0 for the others")
    given = weights(prompts) if callable(weights) else np.ones(count) if weights is None else weights
    try:
        found = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        msg = f"weights are {str(given)[:60]!r}: wanted a number for each of {count} adapters"
        raise UsageError(msg) from error
    if found.shape not in ((count,), (len(prompts), count)):
        msg = f"weights have shape {list(found.shape)}: wanted [{count}], one for each adapter, or "
        raise UsageError(msg + f"[{len(prompts)}, {count}], with a row for each prompt")
    if not np.isfinite(found).all() or (found < 0).any():
        bad = found[~np.isfinite(found) | (found < 0)][0]
        msg = f"a weight is {bad:g}: wanted numbers from 0 on; a row of zeros is the base alone"
        raise UsageError(msg)
    return how.shares(np.broadcast_to(found, (len(prompts), count)))
