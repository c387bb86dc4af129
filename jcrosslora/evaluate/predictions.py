"""Compare the predictions of a base without and with an adapter, position by position over the same texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder import Model, forward
from jcrosslora.decoder.log_probs import Divergence, divergence
from jcrosslora.evaluate.probes import ProbeBatch

_AT_ONCE = 256  # states that the head gets in one call


@dataclass(frozen=True, eq=False)
class Part:
    """A batch of texts as one base reads them; S positions, from each text's first match to the one before its last.

    Attributes:
        tokens: int32 (B, T).
        mask: bool (B, T).
        at: int64 (S,), flat indices into (B, T).
        text: int64 (S,), the row.
        matched: bool (S,), whether the other base has a token that ends here too.
    """

    tokens: np.ndarray
    mask: np.ndarray
    at: np.ndarray
    text: np.ndarray
    matched: np.ndarray


@dataclass(frozen=True, eq=False)
class Figures:
    """Means over the matched positions of each text: (texts,) each, nats.

    Attributes:
        kl: KL(base || base with adapter) of the next token.
        nll: NLL of the text between its first and its last match, which are the same characters for both bases, divided
            by the number of matched positions, which is the same for both as well.
        nll_adapted: the same with the adapter.
        positions: matched positions in all texts.
    """

    kl: np.ndarray
    nll: np.ndarray
    nll_adapted: np.ndarray
    positions: int


def part_of(batch: ProbeBatch, side: int) -> Part:
    """Take the source's (side 0) or the target's (side 1) part; texts with less than two matches have no positions."""
    tokens, mask, at = (
        (batch.tokens_src, batch.mask_src, batch.at_src),
        (batch.tokens_tgt, batch.mask_tgt, batch.at_tgt),
    )[side]
    width, matches = tokens.shape[1], at[batch.valid]
    scored, matched = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    matched.reshape(-1)[matches] = True
    for row in np.unique(matches // width):
        places = np.flatnonzero(matched[row])
        scored[row, places[0] : places[-1]] = True
    picked = np.flatnonzero(scored)
    return Part(tokens, mask, picked, picked // width, matched.reshape(-1)[picked])


def measure(model: Model, parts: Sequence[Part]) -> Figures:
    """Run a base without and with its adapter, and average the figures over each text.

    Args:
        model: the base with an adapter.
        parts: batches of one shape, with one position or more in all; texts without any are left out of the figures.
    """
    # The base is the adapter of zeros: one compiled program serves both.
    base = model.with_adapter(jax.tree.map(jnp.zeros_like, model.adapter))
    plain, adapted = (
        np.concatenate([_picked(_states(one, part.tokens, part.mask), part) for part in parts]) for one in (base, model)
    )
    wanted = np.concatenate([part.tokens.reshape(-1)[part.at + 1] for part in parts])
    found = _through_head(model.with_adapter(None), plain, adapted, wanted)
    matched = np.concatenate([part.matched for part in parts])
    text = np.concatenate([number * len(part.tokens) + part.text for number, part in enumerate(parts)])
    return _by_text(found, text, matched)


def _by_text(found: Divergence, text: np.ndarray, matched: np.ndarray) -> Figures:
    counts = np.bincount(text, weights=matched)
    there = counts > 0

    def mean(values: jax.Array | np.ndarray) -> np.ndarray:
        return np.bincount(text, weights=np.asarray(values, np.float64))[there] / counts[there]

    kl = np.where(matched, found.kl, 0)
    return Figures(mean(kl), mean(-found.log_probs_a), mean(-found.log_probs_b), int(matched.sum()))


def _picked(hidden: jax.Array, part: Part) -> np.ndarray:
    return np.asarray(hidden.reshape(-1, hidden.shape[-1]))[part.at]


def _through_head(model: Model, plain: np.ndarray, adapted: np.ndarray, wanted: np.ndarray) -> Divergence:
    """Give the head the same number of states in each call, so that it is compiled once."""
    count = len(wanted)
    rows = np.arange(-(-count // _AT_ONCE) * _AT_ONCE).clip(max=count - 1).reshape(-1, _AT_ONCE)
    found = [_compare(model, plain[part], adapted[part], wanted[part]) for part in rows]
    return jax.tree.map(lambda *pieces: np.concatenate(pieces)[:count], *found)


@jax.jit
def _states(model: Model, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return forward(model, tokens, mask=mask).hidden


_compare = jax.jit(divergence)
