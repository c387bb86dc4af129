"""Which prompt templates an adapter was probably trained on."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer, pad_right
from jcrosslora.decoder import DecoderSettings, Generator, Params, StackedAdapter, forward
from jcrosslora.decoder.log_probs import divergence
from jcrosslora.fit.distill.templates import PromptTemplate, in_template, templates_of
from jcrosslora.text import Completion, read

_ERRORS = 2.0  # standard errors by which a template may lie behind the best
_MOST = 3  # templates of a fit
_WIDTHS, _ROWS = (40, 64, 128), 8  # shapes (B, T) of the texts that are compared: the fewer, the less to compile


def judge_templates(
    generator: Generator, completions: Sequence[Completion], tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measure an adapter in each of `templates_of` its base on the same completions, put into one after the other.

    The figures then differ by the template alone: they differ more between completions than between templates.

    Args:
        generator: the base, with the adapter.
        completions: n of them, in these templates; their origins are the templates' names.
        tokens: the most tokens of an answer.

    Returns:
        The two figures of `compare`, float64 (templates, n) each.
    """
    templates = templates_of(generator.tokenizer)
    named = {template.name: template for template in templates}
    moved = [in_template(item, named[item.origin], template) for template in templates for item in completions]
    change, base_nll = compare(generator, moved, tokens)
    return change.reshape(len(templates), -1), base_nll.reshape(len(templates), -1)


def known_templates(
    templates: Sequence[PromptTemplate], change: np.ndarray, base_nll: np.ndarray
) -> list[PromptTemplate]:
    """Choose the templates that an adapter was probably trained on: at most 3, in their order.

    An adapter changes its base's predictions in all templates, and most where its answers are least likely under the
    base. A change beyond that comes from training: the templates are taken in which the change less the base NLL is
    largest, or at most two standard errors below the largest.

    Args:
        templates: that were measured.
        change: (templates, n), divergence over the answer of n completions.
        base_nll: (templates, n), NLL of the answer under the base alone.
    """
    if not (change.size and np.isfinite(change).all()):
        return []
    behind = behind_best(change, base_nll)
    means, errors = behind.mean(axis=1), behind.std(axis=1) / np.sqrt(behind.shape[1])
    near = [place for place in np.argsort(means, kind="stable").tolist() if means[place] <= _ERRORS * errors[place]]
    return [templates[place] for place in sorted(near[:_MOST])]


def behind_best(change: np.ndarray, base_nll: np.ndarray) -> np.ndarray:
    """Subtract change - base_nll from that of the template where its mean is largest, (templates, n)."""
    scores = change - base_nll
    return scores[scores.mean(axis=1).argmax()] - scores


def compare(generator: Generator, completions: Sequence[Completion], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Compare the predictions with and without the adapter on each completion.

    Returns:
        KL(with adapter || without) and -log p(token) without it, float64 (n,) each: nats, means over the answer's first
        `tokens` tokens.
    """
    assert generator.adapter is not None
    model, none = (generator.settings, generator.params), jax.tree.map(jnp.zeros_like, generator.adapter)
    change, base_nll = np.zeros(len(completions)), np.zeros(len(completions))
    whole, starts = _read_all(generator.tokenizer, completions)
    # Texts of one length together: every token of padding costs as much as one of text.
    order = sorted(range(len(completions)), key=lambda place: len(whole[place]))
    for first in range(0, len(order), _ROWS):
        part = order[first : first + _ROWS]
        width = next((width for width in _WIDTHS if len(whole[part[-1]]) <= width), _WIDTHS[-1])
        at, token, used = _answer_positions([(whole[place], starts[place]) for place in part], width, tokens)
        rows = [whole[place][-width:] for place in part]
        batch = (*map(jnp.asarray, pad_right(rows, (_ROWS, width))), jnp.asarray(at.ravel()))
        adapted, plain = (_states(*model, one, *batch) for one in (generator.adapter, none))
        found = _divergence(*model, adapted, plain, jnp.asarray(token.ravel()))
        own = used[: len(part)]
        for figure, values in ((change, found.kl), (base_nll, -found.log_probs_b)):
            each = np.asarray(values, np.float64).reshape(used.shape)[: len(part)]
            figure[part] = (each * own).sum(axis=1) / own.sum(axis=1)
    return change, base_nll


def _read_all(tokenizer: Tokenizer, completions: Sequence[Completion]) -> tuple[list[np.ndarray], list[int]]:
    """Tokenize completions without the tokens that end them: ids, and the index of each answer's first token."""
    found = [read(tokenizer, replace(item, ended=False)) for item in completions]
    return [one.ids for one in found], [one.answer for one in found]


def _answer_positions(
    rows: Sequence[tuple[np.ndarray, int]], width: int, tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat positions in front of the answers' tokens, these tokens, and which of them exist; (8, tokens) each.

    Args:
        rows: token ids of each text, and how many of them are the prompt's.
        width: tokens of a row; longer texts keep their end.
        tokens: the most tokens of an answer.
    """
    shape = _ROWS, tokens
    at, token, used = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, (ids, start) in enumerate(rows):
        # An answer whose first token is joined to the prompt still has one.
        places = np.arange(min(start, len(ids) - 1), len(ids))[:tokens]
        at[row, : len(places)] = row * width + np.maximum(places - 1 - max(0, len(ids) - width), 0)
        token[row, : len(places)], used[row, : len(places)] = ids[places], True
    return at, token, used


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


_divergence = jax.jit(divergence, static_argnums=0)
