"""Distillation batches: completions as arrays of few shapes, and the tokens that predictions are compared on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.shared_tokens import shared_ids
from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.errors import MethodError
from jcrosslora.evidence.probes import ProbeBatch, probe_batches
from jcrosslora.fit.distill.templates import Completion

WIDTHS = (24, 40, 64, 96)  # tokens of a row: the fewer shapes, the less to compile
BATCH = 8


@dataclass(frozen=True, eq=False)
class DistillationBatch:
    """A batch of completions as both bases read them; P matched positions.

    Attributes:
        probe: tokens and matched positions of both bases.
        weight: float32 (P,), of each match in the fit; 0 where there is none.
    """

    probe: ProbeBatch
    weight: np.ndarray

    @property
    def positions(self) -> int:
        """Number of matched positions with a weight."""
        return int((self.weight > 0).sum())


def make_batches(
    completions: Sequence[Completion], tokenizers: tuple[Tokenizer, Tokenizer], prompt_weight: float
) -> list[DistillationBatch]:
    """Batch completions by 8, in rows of the smallest of `WIDTHS` that holds them; longer ones are cut.

    Args:
        completions: at least one with a match.
        tokenizers: of source and target.
        prompt_weight: weight of predictions inside a prompt; those of the answer's tokens have 1.
    """
    sizes = [max(len(one.encode(item.text).ids) for one in tokenizers) for item in completions]
    widths = [next((width for width in WIDTHS if size <= width), WIDTHS[-1]) for size in sizes]
    batches = []
    for width in sorted(set(widths)):
        group = [item for item, own in zip(completions, widths, strict=True) if own == width]
        shape = {"length": width, "width": width, "batch": BATCH, "positions": BATCH * width}
        probes = probe_batches([item.text for item in group], *tokenizers, **shape)
        batches += [DistillationBatch(probe, _weights(probe, group, prompt_weight)) for probe in probes]
    return batches


def _weights(probe: ProbeBatch, completions: Sequence[Completion], prompt_weight: float) -> np.ndarray:
    starts = np.array([len(item.prompt) for item in completions])[probe.text]
    return np.where(probe.end >= starts, 1.0, prompt_weight).astype(np.float32) * probe.valid


def shared_tokens(
    source: BaseModel, target: BaseModel, batches: Sequence[DistillationBatch], commonest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the shared tokens that predictions are compared on: those in the batches, and the commonest.

    The tokens of byte-pair encodings are numbered in the order in which they were merged: low ids are frequent.

    Args:
        source: the source base.
        target: the target base.
        batches: all batches of the fit.
        commonest: how many of the source's lowest ids to take, whether they occur or not.

    Returns:
        Their ids in source and target, int32 (V,) each.

    Raises:
        MethodError: a vocabulary cannot be read, or the two share too few tokens.
    """
    ids, reason = shared_ids(source, target)
    if ids is None:
        msg = f"predictions cannot be compared: {reason}; use another method"
        raise MethodError(msg)
    order = np.argsort(ids[0])
    ids_src, ids_tgt = (side[order].astype(np.int32) for side in ids)
    kept = np.isin(ids_src, used_tokens(batches, 0)) | np.isin(ids_tgt, used_tokens(batches, 1))
    kept |= np.arange(len(ids_src)) < commonest
    return ids_src[kept], ids_tgt[kept]


def used_tokens(batches: Sequence[DistillationBatch], side: int) -> np.ndarray:
    """int32, ascending: the tokens that occur in the batches of the source (side 0) or the target (side 1)."""
    rows = [(batch.probe.tokens_src, batch.probe.tokens_tgt)[side].ravel() for batch in batches]
    return np.unique(np.concatenate(rows))
