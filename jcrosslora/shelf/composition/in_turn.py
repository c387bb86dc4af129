"""Add adapters to a base one after the other, and see after each addition what became of the earlier ones."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.examples import Example, read_examples
from jcrosslora.shelf.composition.compose import compose
from jcrosslora.shelf.composition.composed import Composed
from jcrosslora.shelf.composition.fit import mean_divergence
from jcrosslora.shelf.composition.stack import SHARE, Stack
from jcrosslora.training.settings import TrainingSettings


@dataclass(frozen=True, eq=False)
class Additions:
    """N adapters that were added in turn.

    Attributes:
        composed: all of them, as the composition `stack`.
        kl: float64 (N, N), row i after adapter i was added: how far the sum is from each adapter alone, the mean
            KL(adapter alone || sum) over the tokens of the answers in its texts, nats; NaN for later adapters.
    """

    composed: Composed
    kl: np.ndarray

    def __str__(self) -> str:
        """A table: a row for each addition, a column for the texts of each adapter."""
        names = [Path(name).name for name in self.composed.names]
        rows = [["KL on texts of", *names]]
        for name, values in zip(names, self.kl, strict=True):
            rows.append([f"+ {name}", *("" if np.isnan(value) else f"{value:.4f}" for value in values)])
        widths = [max(len(row[place]) for row in rows) for place in range(len(names) + 1)]
        return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def add_in_turn(
    base: BaseModel,
    adapters: Sequence[Adapter | str | Path],
    examples: Sequence[Sequence[Example] | str | Path],
    settings: TrainingSettings = TrainingSettings(rate=0.05),  # noqa: B008
    *,
    rehearse: bool = True,
) -> Additions:
    """Add adapters to a sum one after the other, after SD-LoRA: directions stay, all magnitudes are trained each time.

    After each addition the sum is to predict, on the texts of an adapter, what this adapter predicts alone.

    Args:
        base: the model.
        adapters: at least one of it, in the order in which they are added.
        examples: for each adapter at least one, or the JSONL file of them.
        settings: of the training after each addition; the rate is a share of an update's own magnitude.
        rehearse: whether the texts of earlier adapters are used again; False uses those of the new one alone, as
            SD-LoRA does.

    Raises:
        UsageError: another number of entries than of adapters, an empty one, or as `Composed.fit`.
        AdapterError, CheckpointError: see `compose`.
    """
    texts = [read_examples(each) if isinstance(each, str | Path) else list(each) for each in examples]
    if len(texts) != len(adapters) or not all(texts):
        msg = f"texts of {sum(map(bool, texts))} adapters for {len(adapters)}: give at least one of each, in order"
        raise UsageError(msg)
    composed = compose(base, adapters, Stack())
    loaded, own, kl = {"params": composed.params, "tokenizer": composed.tokenizer}, composed.adapters, []
    for count in range(1, len(texts) + 1):
        grown = compose(base, own[:count], Stack(), **loaded)
        if count > 1:  # the first is the sum already, and Adam would make steps of its gradient's rounding errors
            used = [each if rehearse or place == count - 1 else [] for place, each in enumerate(texts[:count])]
            grown = _continued(grown, composed).fit(used, settings)
        composed, model = grown, (grown.settings, grown.params, grown.tokenizer, grown.updates)
        kl.append([mean_divergence(*model, each, place) for place, each in enumerate(texts[:count])])
    rows = [[*row, *[np.nan] * (len(texts) - len(row))] for row in kl]
    return Additions(composed, np.array(rows))


def _continued(grown: Composed, before: Composed) -> Composed:
    """Keep the magnitudes that earlier adapters have by now."""
    arrays = {}
    for role, one in grown.updates.roles.items():
        shares = one.arrays[SHARE]
        if role in before.updates.roles:
            old = before.updates.roles[role].arrays[SHARE]
            shares = shares.at[:, : old.shape[1]].set(old)
        arrays[role] = {SHARE: shares}
    return dataclasses.replace(grown, updates=grown.updates.with_arrays(arrays))
