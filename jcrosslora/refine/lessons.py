"""Dialogues as arrays of few shapes, and the vocabulary in which both bases' predictions are compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.probes import ProbeBatch, probe_batches
from jcrosslora.refine.dialogues import Dialogue
from jcrosslora.tokens import Tokenizer

WIDTHS = (24, 40, 64, 96)  # tokens of a row: the fewer shapes, the less to compile
BATCH = 8


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch of dialogues.

    Attributes:
        batch: tokens and matches of both bases.
        weight: float32 (P,), of each match in the fit; 0 where there is none.
    """

    batch: ProbeBatch
    weight: np.ndarray


def lessons(
    dialogues: Sequence[Dialogue], tokenizers: tuple[Tokenizer, Tokenizer], prompt_weight: float
) -> list[Lesson]:
    """Dialogues in batches of `BATCH`, in rows of the smallest of `WIDTHS` that holds them; longer ones are cut.

    Args:
        dialogues: at least one with a match.
        tokenizers: of source and target.
        prompt_weight: of the predictions inside a prompt; those of the answer's tokens have 1.
    """
    sizes = [max(len(one.encode(item.text).ids) for one in tokenizers) for item in dialogues]
    found = []
    lower = 0
    for width in WIDTHS:
        upper = width if width != WIDTHS[-1] else max([*sizes, width])
        group = [item for item, size in zip(dialogues, sizes, strict=True) if lower < size <= upper]
        lower = width
        if group:
            texts = [item.text for item in group]
            places = BATCH * width
            batches = probe_batches(texts, *tokenizers, length=width, batch=BATCH, positions=places, width=width)
            found += [Lesson(batch, _weights(batch, group, prompt_weight)) for batch in batches]
    return found


def _weights(batch: ProbeBatch, dialogues: Sequence[Dialogue], prompt_weight: float) -> np.ndarray:
    starts = np.array([len(item.prompt) for item in dialogues])[batch.text]
    return np.where(batch.end >= starts, 1.0, prompt_weight).astype(np.float32) * batch.valid


def shared_tokens(
    source: BaseModel, target: BaseModel, found: Sequence[Lesson], lowest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (V,) in source and target of tokens that both have: those of the lessons and the `lowest` of the source.

    The tokens of byte-pair encodings are numbered in the order in which they were merged: low ids are frequent.
    """
    src, tgt = source.vocabulary().tokens, target.vocabulary().tokens
    assert src is not None
    assert tgt is not None
    used_src = {int(index) for item in found for index in np.unique(item.batch.tokens_src)}
    used_tgt = {int(index) for item in found for index in np.unique(item.batch.tokens_tgt)}
    both = sorted((src[token], tgt[token]) for token in src.keys() & tgt.keys())
    first = both[: max(lowest, 0)]
    kept = sorted({*first, *(pair for pair in both if pair[0] in used_src or pair[1] in used_tgt)})
    ids = np.array(kept, np.int32).reshape(-1, 2)
    return ids[:, 0], ids[:, 1]
