"""The dialogues of a fit: of the user's prompts, or of prompts that the base writes in layouts its adapter knows."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.errors import MethodError
from jcrosslora.refine.dialogues import LAYOUTS, Dialogue, Writer, answer, write_prompts
from jcrosslora.refine.reader import shared_log_probs, weighted_kl
from jcrosslora.refine.settings import FitSettings
from jcrosslora.tokens import pad_right

PILOT = 16  # prompts of each layout, to see which the adapter knows
KNOWN = 0.75  # of the largest change: a layout with less is left out
_WIDTH, _ROWS = 64, 8


@dataclass(frozen=True, eq=False)
class Written:
    """Dialogues, and where they come from, for reports."""

    dialogues: list[Dialogue]
    description: str


def continue_prompts(writer: Writer, prompts: Sequence[str], settings: FitSettings, seed: int) -> Written:
    """Answers to the user's prompts, as many to each as make up the number wanted.

    Of a prompt of more than 64 tokens only the last ones are used: the fit is done in rows of 96, answer included.

    Raises:
        MethodError: the base answers none of them.
    """
    given = [Dialogue(_last(writer, prompt)) for prompt in prompts]
    found: list[Dialogue] = []
    for turn in range(max(1, -(-settings.dialogues // len(given)))):
        part = given[: settings.dialogues - turn * len(given)]
        found += answer(writer, part, seed + turn, length=settings.tokens, temperature=settings.temperature)
    return Written(_enough(found, writer), f"{len(found)} answers to {len(given)} given prompts")


def _last(writer: Writer, prompt: str) -> str:
    ids = writer.tokenizer.encode(prompt).ids
    return prompt if len(ids) <= _WIDTH else writer.tokenizer.decode(ids[-_WIDTH:])


def write_dialogues(writer: Writer, settings: FitSettings, seed: int) -> Written:
    """Prompts and answers, most of them in the layouts in which the adapter changes most where answers begin.

    Raises:
        MethodError: the base writes no prompts, or no answers.
    """
    layouts = [layout for layout in range(len(LAYOUTS)) for _ in range(PILOT)]
    pilot = write_prompts(writer, layouts, seed)
    change = np.array([_first_change(writer, [d for d in pilot if d.layout == k]) for k in range(len(LAYOUTS))])
    known = np.flatnonzero(change >= KNOWN * change.max())
    prompts = [prompt for prompt in pilot if prompt.layout in known]
    missing = max(0, settings.dialogues - len(prompts))
    shares = np.array_split(np.arange(missing), len(known))
    more = [int(layout) for layout, share in zip(known, shares, strict=True) for _ in share]
    if more:
        prompts += write_prompts(writer, more, seed + 1)
    # In an order of its own, so that fewer dialogues than prompts are of all layouts.
    order = np.random.default_rng(seed).permutation(len(prompts))[: settings.dialogues]
    chosen = [prompts[place] for place in order]
    found = answer(writer, chosen, seed, length=settings.tokens, temperature=settings.temperature)
    names = ", ".join(repr(LAYOUTS[layout][0].strip()) for layout in known)
    return Written(_enough(found, writer), f"{len(found)} dialogues that it wrote itself in layouts that begin {names}")


def _enough(found: list[Dialogue], writer: Writer) -> list[Dialogue]:
    if len(found) < 2 * _ROWS:
        msg = (
            f"{writer.name} with the adapter answered {len(found)} prompts, {2 * _ROWS} are wanted: "
            "give more prompts with --probe-text, or use another method"
        )
        raise MethodError(msg)
    return found


def _first_change(writer: Writer, dialogues: Sequence[Dialogue]) -> float:
    """Mean of KL(with adapter || without) of the first token of the answers; 0 without dialogues."""
    assert writer.adapter is not None
    none = jax.tree.map(jnp.zeros_like, writer.adapter)
    total = 0.0
    for start in range(0, len(dialogues), _ROWS):
        ids = [writer.tokenizer.encode(item.prompt).ids[-_WIDTH:] for item in dialogues[start : start + _ROWS]]
        tokens, mask = map(jnp.asarray, pad_right(ids, (_ROWS, _WIDTH)))
        counts = np.array([len(own) for own in ids] + [1] * (_ROWS - len(ids)), np.int32)
        last = jnp.asarray(np.arange(_ROWS, dtype=np.int32) * _WIDTH + counts - 1)
        with_adapter, without = (
            shared_log_probs(writer.settings, writer.params, one, tokens, mask, last) for one in (writer.adapter, none)
        )
        weight = jnp.asarray(np.arange(_ROWS) < len(ids), jnp.float32)
        total += float(weighted_kl(with_adapter, without, weight)[0])
    return total / max(1, len(dialogues))
