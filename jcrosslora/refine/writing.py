"""The dialogues of a fit: of the user's prompts, or of prompts that the base writes in layouts its adapter knows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.errors import MethodError
from jcrosslora.refine.dialogues import LAYOUTS, Dialogue, Writer, answer, write_prompts
from jcrosslora.refine.reader import shared_log_probs
from jcrosslora.refine.settings import FitSettings
from jcrosslora.tokens import pad_right

PILOT = 16  # dialogues in each layout, to see which the adapter knows, and again as many in those that it may know
KNOWN = 0.5  # of the largest change: a layout with less is left out
_WIDTHS, _ROWS = (40, 64), 8  # tokens of a row that is compared: the fewer shapes, the less to compile
FEWEST = 2 * _ROWS  # dialogues of a fit


@dataclass(frozen=True, eq=False)
class Written:
    """Dialogues, and where they come from, for reports."""

    dialogues: list[Dialogue]
    description: str


def continue_prompts(writer: Writer, prompts: Sequence[str], settings: FitSettings, seed: int) -> Written:
    """Answers to the user's prompts, as many to each as make up the number wanted.

    Of a prompt of more than 64 tokens only the last ones are used: the fit is done in rows of 96, answer included.
    Where there are more prompts than answers are wanted, the first ones are used.

    Raises:
        MethodError: the base answers too few of them, or there is only one.
    """
    given = [Dialogue(_last(writer, prompt)) for prompt in prompts]
    found: list[Dialogue] = []
    for turn in range(max(1, -(-settings.dialogues // len(given)))):
        part = given[: settings.dialogues - turn * len(given)]
        found += answer(writer, part, seed + turn, length=settings.tokens, temperature=settings.temperature)
    used = f"the first {settings.dialogues} of " if len(given) > settings.dialogues else ""
    return Written(_enough(found, writer), f"{len(found)} answers to {used}{len(given)} given prompts")


def _last(writer: Writer, prompt: str) -> str:
    ids = writer.tokenizer.encode(prompt).ids
    if len(ids) <= _WIDTHS[-1]:
        return prompt
    # With the special tokens that the prompt names: where an answer begins, they are what a chat model goes by.
    return writer.tokenizer.backend.decode(ids[-_WIDTHS[-1] :].tolist(), skip_special_tokens=False)


def write_dialogues(writer: Writer, settings: FitSettings, seed: int) -> Written:
    """Prompts and answers in the layouts that the adapter knows, which `known_layouts` tells from a pilot.

    Raises:
        MethodError: the base writes no prompts, or no answers.
    """
    pilot = _answer(writer, write_prompts(writer, _each(range(len(LAYOUTS)), PILOT), seed), settings, seed)
    figures = compare(writer, pilot, settings.tokens)
    maybe = _known(pilot, figures, errors=2)
    kept = [place for place, item in enumerate(pilot) if item.layout in maybe]
    more = _answer(writer, write_prompts(writer, _each(maybe, PILOT), seed + 1), settings, seed + 1)
    new = compare(writer, more, settings.tokens)
    pilot = [pilot[place] for place in kept] + more
    figures = np.append(figures[0][kept], new[0]), np.append(figures[1][kept], new[1])
    known = _known(pilot, figures, errors=1)
    found = [item for item in pilot if item.layout in known]
    missing = max(0, settings.dialogues - len(found))
    if known and missing:
        shares = np.array_split(np.arange(missing), len(known))
        layouts = [layout for layout, share in zip(known, shares, strict=True) for _ in share]
        found += _answer(writer, write_prompts(writer, layouts, seed + 2), settings, seed + 2)
    # In an order of its own, so that fewer dialogues than there are come from all of them.
    order = np.random.default_rng(seed).permutation(len(found))[: settings.dialogues]
    found = [found[place] for place in order]
    names = ", ".join(repr(LAYOUTS[layout][0].strip()) for layout in known)
    return Written(_enough(found, writer), f"{len(found)} dialogues that it wrote itself in layouts that begin {names}")


def known_layouts(change: Mapping[int, np.ndarray], surer: Mapping[int, np.ndarray], errors: float = 1.0) -> list[int]:
    """The layouts that an adapter was probably trained on.

    An adapter changes its base's predictions in layouts that it was never trained on too, and there as much or more,
    but makes the base less sure of them. So of the layouts with a good part of the largest change those are taken in
    which it becomes surest (or loses least), and those that may be as good.

    Args:
        change: of each layout, for each of its dialogues, the divergence where the answer begins.
        surer: likewise, by how much the entropy of the predictions falls over the answer.
        errors: how many standard errors of the best layout's mean another may lie below it.
    """
    changes = {layout: float(values.mean()) for layout, values in change.items()}
    near = [layout for layout, value in changes.items() if value >= KNOWN * max(changes.values())]
    if not near:
        return []
    gains = {layout: float(surer[layout].mean()) for layout in near}
    best = max(near, key=gains.__getitem__)
    slack = errors * float(surer[best].std() / np.sqrt(len(surer[best])))
    return [layout for layout in near if gains[layout] >= gains[best] - slack]


def _known(dialogues: Sequence[Dialogue], figures: tuple[np.ndarray, np.ndarray], errors: float) -> list[int]:
    change, surer = (by_layout(dialogues, values) for values in figures)
    return known_layouts(change, surer, errors)


def _each(layouts: Iterable[int], count: int) -> list[int]:
    return [layout for layout in layouts for _ in range(count)]


def _answer(writer: Writer, prompts: Sequence[Dialogue], settings: FitSettings, seed: int) -> list[Dialogue]:
    return answer(writer, prompts, seed, length=settings.tokens, temperature=settings.temperature)


def by_layout(dialogues: Sequence[Dialogue], values: np.ndarray) -> dict[int, np.ndarray]:
    """Values (n,) of n dialogues, apart for each layout that occurs."""
    layouts = np.array([item.layout for item in dialogues], int)
    return {int(layout): values[layouts == layout] for layout in np.unique(layouts)}


def _enough(found: list[Dialogue], writer: Writer) -> list[Dialogue]:
    different = len({item.prompt for item in found})
    if len(found) >= FEWEST and different > 1:
        return found
    # No step is fitted on the prompts that are held out, and one at least is.
    came = f"{len(found)} prompts, {FEWEST}" if len(found) < FEWEST else "one and the same prompt, 2 different ones"
    msg = (
        f"{writer.name} with the adapter answered {came} are wanted: "
        "give more prompts with --probe-text, or use another method"
    )
    raise MethodError(msg)


def compare(writer: Writer, dialogues: Sequence[Dialogue], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """What the adapter changes in each dialogue, float64 (n,) each.

    Returns:
        KL(with adapter || without) where the answer begins, and by how much the entropy of the predictions is lower
        with it, in the mean over the answer's first `tokens` tokens; nats.
    """
    assert writer.adapter is not None
    none = jax.tree.map(jnp.zeros_like, writer.adapter)
    change, surer = np.zeros(len(dialogues)), np.zeros(len(dialogues))
    whole = [writer.tokenizer.encode(item.text).ids for item in dialogues]
    begins = [len(writer.tokenizer.encode(item.prompt).ids) for item in dialogues]
    # Texts of one length together: every token of padding costs as much as one of text.
    order = sorted(range(len(dialogues)), key=lambda place: len(whole[place]))
    for start in range(0, len(order), _ROWS):
        part = order[start : start + _ROWS]
        width = next((width for width in _WIDTHS if len(whole[part[-1]]) <= width), _WIDTHS[-1])
        at, seen = np.zeros((_ROWS, tokens), np.int32), np.zeros((_ROWS, tokens), bool)
        for row, place in enumerate(part):
            # The prediction of a token is at the one before it.
            length, begin = len(whole[place]), begins[place]
            places = np.arange(begin, max(begin + 1, length))[:tokens] - 1 - max(0, length - width)
            at[row, : len(places)], seen[row, : len(places)] = row * width + np.maximum(places, 0), True
        ids = [whole[place][-width:] for place in part]
        batch = (*map(jnp.asarray, pad_right(ids, (_ROWS, width))), jnp.asarray(at.ravel()))
        changed, plain = (
            shared_log_probs(writer.settings, writer.params, one, *batch) for one in (writer.adapter, none)
        )
        figures = _divergence_and_fall(changed, plain)
        divergence, fall = (np.asarray(x, np.float64).reshape(at.shape)[: len(part)] for x in figures)
        own = seen[: len(part)]
        change[part], surer[part] = divergence[:, 0], (fall * own).sum(axis=1) / own.sum(axis=1)
    return change, surer


@jax.jit
def _divergence_and_fall(changed: jax.Array, plain: jax.Array) -> tuple[jax.Array, jax.Array]:
    own = jnp.sum(jnp.exp(changed) * changed, axis=-1)
    return own - jnp.sum(jnp.exp(changed) * plain, axis=-1), own - jnp.sum(jnp.exp(plain) * plain, axis=-1)
