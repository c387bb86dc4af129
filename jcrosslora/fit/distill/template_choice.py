"""The completions of a fit: of the user's prompts, or of prompts that the base writes in templates its adapter knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint.tokenizer import pad_right
from jcrosslora.decoder import DecoderSettings, Params, StackedAdapter, forward
from jcrosslora.decoder.divergence import divergence
from jcrosslora.errors import MethodError
from jcrosslora.fit.distill.completions import TEMPLATES, Completion, Writer, answer, in_template, write_prompts
from jcrosslora.fit.distill.settings import FitSettings

PILOT = 6  # completions in each template, from which it is seen which the adapter knows
ERRORS = 2.0  # standard errors by which a template may lie behind the best
MOST = 3  # templates of a fit
_WIDTHS, _ROWS = (40, 64), 8  # tokens of a row that is compared: the fewer shapes, the less to compile
FEWEST = 2 * _ROWS  # completions of a fit


@dataclass(frozen=True, eq=False)
class Written:
    """Completions, and where they come from, for reports."""

    completions: list[Completion]
    description: str


def continue_prompts(writer: Writer, prompts: Sequence[str], settings: FitSettings, seed: int) -> Written:
    """Answers to the user's prompts, as many to each as make up the number wanted.

    Of a prompt of more than 64 tokens only the last ones are used: the fit is done in rows of 96, answer included.
    Where there are more prompts than answers are wanted, the first ones are used.

    Raises:
        MethodError: the base answers too few of them, or there is only one.
        AdapterError: with the adapter the base's predictions are not finite.
    """
    given = [Completion(_last(writer, prompt)) for prompt in prompts]
    found: list[Completion] = []
    for turn in range(max(1, -(-settings.completions // len(given)))):
        part = given[: settings.completions - turn * len(given)]
        found += answer(writer, part, seed + turn, length=settings.tokens, temperature=settings.temperature)
    used = f"the first {settings.completions} of " if len(given) > settings.completions else ""
    return Written(_enough(found, writer), f"{len(found)} answers to {used}{len(given)} given prompts")


def _last(writer: Writer, prompt: str) -> str:
    ids = writer.tokenizer.encode(prompt).ids
    if len(ids) <= _WIDTHS[-1]:
        return prompt
    # With the special tokens that the prompt names: where an answer begins, they are what a chat model goes by.
    return writer.tokenizer.backend.decode(ids[-_WIDTHS[-1] :].tolist(), skip_special_tokens=False)


def write_completions(writer: Writer, settings: FitSettings, seed: int) -> Written:
    """Prompts and answers in the templates that the adapter knows, which a pilot tells.

    Raises:
        MethodError: the base writes no prompts, or no answers.
        AdapterError: with the adapter the base's predictions are not finite.
    """
    pilot = write_pilot(writer, settings, seed)
    known = known_templates(*judge_templates(writer, pilot, settings.tokens))
    found = [item for item in pilot if item.template in known]
    missing = max(0, settings.completions - len(found))
    if known and missing:
        shares = np.array_split(np.arange(missing), len(known))
        templates = [template for template, share in zip(known, shares, strict=True) for _ in share]
        found += _answer(writer, write_prompts(writer, templates, seed + 1), settings, seed + 1)
    # In an order of its own, so that fewer completions than there are come from all of them.
    order = np.random.default_rng(seed).permutation(len(found))[: settings.completions]
    found = [found[place] for place in order]
    names = ", ".join(repr(TEMPLATES[template][0].strip()) for template in known)
    return Written(
        _enough(found, writer), f"{len(found)} completions that it wrote itself in templates that begin {names}"
    )


def write_pilot(writer: Writer, settings: FitSettings, seed: int, each: int = PILOT) -> list[Completion]:
    """Prompts and answers in all of `TEMPLATES`, `each` in each or a few less."""
    templates = [template for template in range(len(TEMPLATES)) for _ in range(each)]
    found = _answer(writer, write_prompts(writer, templates, seed), settings, seed)
    return [item for item in found if item.answer.strip()]


def judge_templates(writer: Writer, completions: Sequence[Completion], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """What an adapter does in each of `TEMPLATES`, by the same completions put into one after the other.

    So figures differ by the template alone: they differ more from one completion to another than between templates.

    Args:
        writer: the base, with the adapter.
        completions: n of them, in templates of `TEMPLATES`.
        tokens: of an answer at most.

    Returns:
        The two figures of `compare`, float64 (len(TEMPLATES), n) each.
    """
    moved = [in_template(item, template) for template in range(len(TEMPLATES)) for item in completions]
    change, base_nll = compare(writer, moved, tokens)
    return change.reshape(len(TEMPLATES), -1), base_nll.reshape(len(TEMPLATES), -1)


def known_templates(change: np.ndarray, base_nll: np.ndarray) -> list[int]:
    """The templates that an adapter was probably trained on: at most `MOST`, in the order of `TEMPLATES`.

    An adapter changes its base's predictions in all templates, and most where what it makes the base say is strangest to
    the base itself. What goes beyond that is training: those templates are taken in which the change less the base NLL
    is largest, or may be.

    Args:
        change: (templates, n), of n completions the divergence over the answer.
        base_nll: (templates, n), likewise how base_nll the answer is to the base.
    """
    if not (change.size and np.isfinite(change).all()):
        return []
    behind = behind_best(change, base_nll)
    means, errors = behind.mean(axis=1), behind.std(axis=1) / np.sqrt(behind.shape[1])
    order = [
        template
        for template in np.argsort(means, kind="stable").tolist()
        if means[template] <= ERRORS * errors[template]
    ]
    return sorted(order[:MOST])


def behind_best(change: np.ndarray, base_nll: np.ndarray) -> np.ndarray:
    """By how much less change - base_nll is in each template than in the one where its mean is largest, (templates, n)."""
    scores = change - base_nll
    return scores[scores.mean(axis=1).argmax()] - scores


def _answer(writer: Writer, prompts: Sequence[Completion], settings: FitSettings, seed: int) -> list[Completion]:
    return answer(writer, prompts, seed, length=settings.tokens, temperature=settings.temperature)


def _enough(found: list[Completion], writer: Writer) -> list[Completion]:
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


def compare(writer: Writer, completions: Sequence[Completion], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """What the adapter changes in each completion, float64 (n,) each.

    Returns:
        KL(with adapter || without) and -log p(token) without it, nats, in the mean over the answer's first `tokens`
        tokens.
    """
    assert writer.adapter is not None
    none = jax.tree.map(jnp.zeros_like, writer.adapter)
    change, base_nll = np.zeros(len(completions)), np.zeros(len(completions))
    whole = [writer.tokenizer.encode(item.text).ids for item in completions]
    begins = [len(writer.tokenizer.encode(item.prompt).ids) for item in completions]
    # Texts of one length together: every token of padding costs as much as one of text.
    order = sorted(range(len(completions)), key=lambda place: len(whole[place]))
    for start in range(0, len(order), _ROWS):
        part = order[start : start + _ROWS]
        width = next((width for width in _WIDTHS if len(whole[part[-1]]) <= width), _WIDTHS[-1])
        shape = _ROWS, tokens
        at, token, seen = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, place in enumerate(part):
            # The prediction of a token is at the one before it. An answer that a token joins to its prompt has one.
            ids = whole[place]
            places = np.arange(min(begins[place], len(ids) - 1), len(ids))[:tokens]
            at[row, : len(places)] = row * width + np.maximum(places - 1 - max(0, len(ids) - width), 0)
            token[row, : len(places)], seen[row, : len(places)] = ids[places], True
        rows = [whole[place][-width:] for place in part]
        batch = (*map(jnp.asarray, pad_right(rows, (_ROWS, width))), jnp.asarray(at.ravel()))
        adapted, plain = (_states(writer.settings, writer.params, one, *batch) for one in (writer.adapter, none))
        figures = _compared(writer.settings, writer.params, adapted, plain, jnp.asarray(token.ravel()))
        own = seen[: len(part)]
        for found, values in ((change, figures.kl), (base_nll, -figures.log_probs_b)):
            each = np.asarray(values, np.float64).reshape(shape)[: len(part)]
            found[part] = (each * own).sum(axis=1) / own.sum(axis=1)
    return change, base_nll


@partial(jax.jit, static_argnums=0)
def _states(
    settings: DecoderSettings,
    params: Params,
    adapter: StackedAdapter,
    tokens: jax.Array,
    mask: jax.Array,
    at: jax.Array,
) -> jax.Array:
    hidden = forward(settings, params, tokens, mask=mask, adapter=adapter).hidden
    return hidden.reshape(-1, hidden.shape[-1])[at]


_compared = jax.jit(divergence, static_argnums=0)
