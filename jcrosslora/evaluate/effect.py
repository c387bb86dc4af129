"""Compare the effect of the moved adapter on the target with the original's effect on the source, on the same text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import LoadedBases, Model, divergence, forward, stack_adapter
from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.errors import MethodError, UsageError, not_finite
from jcrosslora.evaluate.probes import ProbeBatch, TextSettings, probe_batches, write_texts
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.picking import pick_evenly
from jcrosslora.utils.progress import track

Adapted = tuple[BaseModel, Adapter]  # a base with an adapter of it
Outcome = Literal["ineffective", "destructive", "plausible", "unmeasured"]
# Bounds of the target's divergence over the source's. An adapter for ARC-Easy of SmolLM2-135M-Instruct, moved to
# Gemma-3-270M by theseus at scales 0.3, 1 and 2, has ratios of 0.15, 1.7 and 6.8; the answers to 32 training questions
# become more likely at 0.3, keep their likelihood at 1 and lose it at 2. Random factors of the same norm have 0.04.
INEFFECTIVE, DESTRUCTIVE = 0.05, 5.0
# Bound of the loss in log-likelihood of text written with the adapter, over the source's divergence. It is 0.03, 1.2
# and 5.2 at these scales (1.6 instead of 1.2 if the divergence is taken on the written text too), and 1.8 (2.4) at
# scale -1, at which the answers lose likelihood as well.
LOSS = 1.7
_ERRORS = 2.0  # standard errors
# In nats; a smaller divergence is rounding.
_ROUNDING = 1e-6
TEXTS, LENGTH = 12, 64  # texts of each kind, and tokens of a text: about 700 positions
_BATCH = 6
_AT_ONCE = 256  # states that the head gets in one call


class Change(msgspec.Struct, frozen=True):
    """The change that an adapter makes in the predictions of one base: nats a position, means over texts.

    A figure that is not finite is None.

    Attributes:
        kl: KL(base || base with adapter) of the next token, over the whole vocabulary.
        kl_spread: standard deviation over texts of their mean; None for a single text.
        nll: negative log-likelihood (NLL) of the text under the base.
        nll_adapted: NLL of the text under the base with the adapter.
    """

    kl: float | None
    kl_spread: float | None
    nll: float | None
    nll_adapted: float | None

    @classmethod
    def of(cls, kl: np.ndarray, nll: np.ndarray, nll_adapted: np.ndarray) -> Change:
        """Average over texts: the divergence of each, (texts,), and its NLL without and with the adapter, (texts',)."""
        return cls(*map(_finite, (np.mean(kl), _deviation(kl), np.mean(nll), np.mean(nll_adapted))))


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """The effect of a moved adapter, at positions where tokens of both bases end, in the same texts.

    Attributes:
        source: change by the original adapter on the source.
        target: change by the moved adapter on the target.
        excess: growth of the text's NLL on the target beyond what it should be, nats a position, mean over texts. For
            text that the source wrote with its adapter it is the target's growth, which should be negative; for other
            text the target's growth less the source's. None if it is not finite.
        excess_error: its standard error over texts; None for a single text.
        texts: number of texts, those for likelihoods included.
        positions: number of positions in them.
        written: whether the likelihoods are of text that the source wrote with its adapter.
        share: the target's divergence over the source's; None if the source's is only rounding.
        outcome: "destructive": the target's predictions are no longer finite, its divergence is far above the source's,
            or the text becomes clearly less likely: `excess` is above 1.7 times the source's divergence and above two
            standard errors. "ineffective": the target's divergence is a small share of the source's. "unmeasured": the
            original adapter changes nothing on these texts. "plausible": none of these.
        sentence: the outcome with its figures, without a full stop.
    """

    source: Change
    target: Change
    excess: float | None
    excess_error: float | None
    texts: int
    positions: int
    written: bool
    share: float | None
    outcome: Outcome
    sentence: str

    @classmethod
    def of(
        cls, changes: tuple[Change, Change], excess: tuple[float, float], *, texts: int, positions: int, written: bool
    ) -> Effect:
        """Judge an effect by the changes of source and target, and by the excess with its standard error."""
        share, outcome = _judge(*changes, *excess)
        return cls(
            source=changes[0],
            target=changes[1],
            excess=_finite(excess[0]),
            excess_error=_finite(excess[1]),
            texts=texts,
            positions=positions,
            written=written,
            share=share,
            outcome=outcome,
            sentence=_sentence(*changes, outcome),
        )


def _judge(source: Change, target: Change, excess: float, excess_error: float) -> tuple[float | None, Outcome]:
    """Return the share of the divergences and the outcome, see `Effect`."""
    share = None
    if source.kl is not None and source.kl > _ROUNDING and target.kl is not None:
        share = target.kl / source.kl
    if target.kl is None or target.nll_adapted is None:
        return share, "destructive"
    if share is None or source.kl is None:
        return share, "unmeasured"
    # The error of a single text is NaN, and its growth is judged by the bound alone.
    bound = max(LOSS * source.kl, 0.0 if math.isnan(excess_error) else _ERRORS * excess_error)
    if share > DESTRUCTIVE or excess > bound:
        return share, "destructive"
    return share, "ineffective" if share < INEFFECTIVE else "plausible"


def _sentence(source: Change, target: Change, outcome: Outcome) -> str:
    """Write the outcome with its figures, without a full stop."""
    figures = source.kl, source.nll, source.nll_adapted, target.kl, target.nll, target.nll_adapted
    kl_src, nll_src, adapted_src, kl, nll, adapted = (math.nan if one is None else one for one in figures)
    if math.isnan(kl) or math.isnan(adapted):
        return "the moved update is destructive: with it the target's predictions are not finite numbers"
    size = f"KL {kl:.2g} nats a position against {kl_src:.2g} on the source"
    growth = f"log-likelihood of the text {nll - adapted:+.2g} against {nll_src - adapted_src:+.2g}"
    return {
        "ineffective": f"the moved update is ineffective ({size}): it changes far less than the original does",
        "destructive": f"the moved update is destructive ({size}; {growth}): do not use it at this strength",
        "plausible": f"the moved update changes the target's predictions by a plausible amount ({size}; {growth})",
        "unmeasured": f"the effect cannot be judged: the original update changes nothing on these texts ({size})",
    }[outcome]


def check_effect(
    original: Adapted,
    moved: Adapted,
    texts: Sequence[str],
    *,
    written: Sequence[str] = (),
    loaded: LoadedBases | None = None,
) -> Effect:
    """Measure the change by a moved adapter on the target, and by the original on the source.

    At most 12 texts of each kind are used, evenly spread, and 64 tokens of each. One base is in memory at a time,
    unless `loaded` keeps them.

    Args:
        original: the source with its adapter, whose fused matrices are split (see `fit_to_base`).
        moved: the target with the result of the transfer.
        texts: probe texts, for the divergences; if there are none, `written` is used for both.
        written: texts that the source wrote with its adapter (see `adapter_texts`), for the likelihoods; if there are
            none, `texts` is used for both.
        loaded: gives the weights of both bases; None loads them.

    Raises:
        UsageError: no text at all, or none of either kind with two positions at which tokens of both bases end.
        AdapterError: an adapter does not fit its base, or the source's predictions with its own are not finite.
        CheckpointError: a base or its tokenizer cannot be read, or its predictions are not finite.
    """
    tokenizers = load_tokenizer(original[0]), load_tokenizer(moved[0])
    kinds = [_batches(kind, tokenizers) for kind in (texts, written)]
    batches = [kind for kind in kinds if kind]
    if not batches:
        msg = "no text has two positions at which tokens of both bases end, to measure an effect on: give longer texts"
        raise UsageError(msg)
    found, loaded = [], loaded or LoadedBases()
    with track(2 * len(batches), "measure the effect", "passes") as bar:
        for side, (base, adapter) in enumerate((original, moved)):
            model = loaded.model(base).with_adapter(stack_adapter(adapter, base))
            for kind in batches:
                found.append(measure(model, [part_of(batch, side) for batch in kind]))
                bar.update()
            del model
    src, tgt = found[: len(batches)], found[len(batches) :]
    _check_finite(src, *original)
    _check_finite(tgt, moved[0], None)
    growth_src, growth_tgt = (side[-1].nll_adapted - side[-1].nll for side in (src, tgt))
    excess = growth_tgt if kinds[1] else growth_tgt - growth_src
    change_src, change_tgt = (Change.of(side[0].kl, side[-1].nll, side[-1].nll_adapted) for side in (src, tgt))
    return Effect.of(
        (change_src, change_tgt),
        (float(np.mean(excess)), _deviation(excess) / math.sqrt(len(excess))),
        texts=sum(len(one.kl) for one in src),
        positions=sum(one.positions for one in src),
        written=bool(kinds[1]),
    )


def _deviation(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _finite(value: float | np.floating) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True, eq=False)
class Part:
    """A batch of texts as one base reads them; S positions, from each text's first match to the one before its last.

    Attributes:
        tokens: int32 (B, T).
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


def effect_cost(*, written: bool) -> Cost:
    """Count a check; texts of both kinds, or only those that were written for a fit."""
    tokens = 2 * TEXTS * LENGTH * (1 if written else 2)
    read = Cost(source=tokens, target=tokens, predicted=(tokens, tokens), precise=True)
    return read if written else read + writing_cost(TEXTS, LENGTH, prompt=1)


def adapter_texts(source: BaseModel, adapter: Adapter, *, seed: int = 0, model: Model | None = None) -> list[str]:
    """Let a base write as many texts with an adapter as `check_effect` uses.

    Returns:
        The texts; none if too few of them can be used, as with an adapter for answers of one word.

    Raises:
        AdapterError: the adapter does not fit the base, or the base's predictions with it are not finite.
        CheckpointError: the base or its tokenizer cannot be read, or its predictions are not finite.
    """
    try:
        return write_texts(source, TextSettings(TEXTS, LENGTH, seed=seed), adapter, model=model)
    except MethodError:
        return []


def _batches(texts: Sequence[str], tokenizers: tuple[Tokenizer, Tokenizer]) -> list[ProbeBatch]:
    """Batch the texts for both bases; return nothing if no text has two positions that match."""
    if not texts:
        return []
    try:
        found = probe_batches(pick_evenly(texts, TEXTS), tokenizers, length=LENGTH, batch=_BATCH)
    except UsageError:  # no position matches
        return []
    return found if any(part_of(batch, 0).at.size for batch in found) else []


def _check_finite(figures: Sequence[Figures], base: BaseModel, adapter: Adapter | None) -> None:
    """Check that the predictions of a base and of its original adapter are finite; a moved adapter's may not be."""
    if not all(np.isfinite(one.nll).all() for one in figures):
        raise not_finite(base.ref)
    if adapter is not None and not all(np.isfinite(one.nll_adapted).all() for one in figures):
        raise not_finite(base.ref, adapter.info.name, sound=True)


def part_of(batch: ProbeBatch, side: int) -> Part:
    """Take the source's (side 0) or the target's (side 1) part; texts with fewer than two matches have no positions."""
    source = batch.tokens_src, batch.mask_src, batch.at_src
    tokens, mask, at = (batch.tokens_tgt, batch.mask_tgt, batch.at_tgt) if side else source
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

    The parts are batches of one shape, with one position or more in all; texts without any are left out of the figures.
    """

    def states(one: Model, part: Part) -> np.ndarray:
        hidden = _states(one, part.tokens, part.mask)
        return np.asarray(hidden.reshape(-1, hidden.shape[-1]))[part.at]

    # The base is the adapter of zeros: one compiled program serves both.
    base = model.with_adapter(jax.tree.map(jnp.zeros_like, model.adapter))
    plain, adapted = (np.concatenate([states(one, part) for part in parts]) for one in (base, model))
    wanted = np.concatenate([part.tokens.reshape(-1)[part.at + 1] for part in parts])
    found = _in_pieces(partial(_compare, model.with_adapter(None)), _AT_ONCE, plain, adapted, wanted)
    matched = np.concatenate([part.matched for part in parts])
    text = np.concatenate([number * len(part.tokens) + part.text for number, part in enumerate(parts)])
    counts = np.bincount(text, weights=matched)

    def mean(values: jax.Array | np.ndarray) -> np.ndarray:
        return np.bincount(text, weights=np.asarray(values, np.float64))[counts > 0] / counts[counts > 0]

    kl = np.where(matched, found.kl, 0)
    return Figures(mean(kl), mean(-found.log_probs_a), mean(-found.log_probs_b), int(matched.sum()))


@jax.jit
def _states(model: Model, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return forward(model, tokens, mask=mask).hidden


_compare = jax.jit(divergence)


def _in_pieces(function: Callable[..., Any], size: int, *arrays: np.ndarray) -> Any:
    """Call a function with `size` rows at a time, so that it is compiled once, and join the results."""
    count = len(arrays[0])
    padded = [np.pad(array, ((0, -count % size), *[(0, 0)] * (array.ndim - 1))) for array in arrays]
    found = [function(*(array[start : start + size] for array in padded)) for start in range(0, count, size)]
    return jax.tree.map(lambda *pieces: np.concatenate(pieces)[:count], *found)
