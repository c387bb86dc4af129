"""Completions as arrays of few shapes, and the vocabulary in which both bases' predictions are compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.shared_tokens import shared_ids
from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.errors import MethodError
from jcrosslora.evidence.probes import ProbeBatch, probe_batches
from jcrosslora.fit.distill.completions import Completion

WIDTHS = (24, 40, 64, 96)  # tokens of a row: the fewer shapes, the less to compile
BATCH = 8


@dataclass(frozen=True, eq=False)
class DistillationBatch:
    """A batch of completions.

    Attributes:
        batch: tokens and matches of both bases.
        weight: float32 (P,), of each match in the fit; 0 where there is none.
    """

    batch: ProbeBatch
    weight: np.ndarray


def distillation_batches(
    completions: Sequence[Completion], tokenizers: tuple[Tokenizer, Tokenizer], prompt_weight: float
) -> list[DistillationBatch]:
    """Completions in batches of `BATCH`, in rows of the smallest of `WIDTHS` that holds them; longer ones are cut.

    Args:
        completions: at least one with a match.
        tokenizers: of source and target.
        prompt_weight: of the predictions inside a prompt; those of the answer's tokens have 1.
    """
    sizes = [max(len(one.encode(item.text).ids) for one in tokenizers) for item in completions]
    found = []
    lower = 0
    for width in WIDTHS:
        upper = width if width != WIDTHS[-1] else max([*sizes, width])
        group = [item for item, size in zip(completions, sizes, strict=True) if lower < size <= upper]
        lower = width
        if group:
            texts = [item.text for item in group]
            places = BATCH * width
            batches = probe_batches(texts, *tokenizers, length=width, batch=BATCH, positions=places, width=width)
            found += [DistillationBatch(batch, _weights(batch, group, prompt_weight)) for batch in batches]
    return found


def _weights(batch: ProbeBatch, completions: Sequence[Completion], prompt_weight: float) -> np.ndarray:
    starts = np.array([len(item.prompt) for item in completions])[batch.text]
    return np.where(batch.end >= starts, 1.0, prompt_weight).astype(np.float32) * batch.valid


def shared_tokens(
    source: BaseModel, target: BaseModel, found: Sequence[DistillationBatch], lowest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (V,) in source and target of tokens that both have: those of the distillation_batches and the `lowest` of the source.

    The tokens of byte-pair encodings are numbered in the order in which they were merged: low ids are frequent.

    Raises:
        MethodError: a vocabulary cannot be read, or they share too few tokens.
    """
    ids, reason = shared_ids(source, target)
    if ids is None:
        msg = f"predictions cannot be compared: {reason}; use another method"
        raise MethodError(msg)
    order = np.argsort(ids[0])
    ids_src, ids_tgt = (side[order].astype(np.int32) for side in ids)
    used_src, used_tgt = (
        np.unique(np.concatenate([tokens.ravel() for tokens in side]))
        for side in ([item.batch.tokens_src for item in found], [item.batch.tokens_tgt for item in found])
    )
    kept = np.isin(ids_src, used_src) | np.isin(ids_tgt, used_tgt) | (np.arange(len(ids_src)) < lowest)
    return ids_src[kept], ids_tgt[kept]
