"""Which prompt templates an adapter was probably trained on."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jcrosslora.distill.sources.protocol import Compared, Source
from jcrosslora.distill.templates import PromptTemplate, in_template, templates_of
from jcrosslora.text import Completion, read
from jcrosslora.utils.cost import TEXT, Cost

_ERRORS = 2.0  # standard errors by which a template may lie behind the best
_MOST = 3  # templates of a fit


def judge_templates(source: Source, completions: Sequence[Completion], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Measure an adapter in each of `templates_of` its base on the same completions, put into one after the other.

    The figures then differ by the template alone: they differ more between completions than between templates.

    Args:
        source: the base, with the adapter.
        completions: n of them, in these templates; their origins are the templates' names.
        tokens: the most tokens of an answer.

    Returns:
        The change and the base NLL of `compare`, float64 (templates, n) each.
    """
    templates = templates_of(source.tokenizer)
    named = {template.name: template for template in templates}
    moved = [in_template(item, named[item.origin], template) for template in templates for item in completions]
    change, base_nll, _ = compare(source, moved, tokens)
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


def comparing_cost(texts: int) -> Cost:
    """Count `compare` on texts, with the adapter and without."""
    return Cost(source=2 * texts * TEXT)


def compare(source: Source, completions: Sequence[Completion], tokens: int) -> Compared:
    """Compare the predictions with and without the adapter on the first tokens of each completion's answer."""
    found = [read(source.tokenizer, replace(item, ended=False)) for item in completions]
    # What follows the last of these tokens has no part in their predictions, and takes as much time as they do.
    return source.compare([one.ids[: one.answer + tokens] for one in found], [one.answer for one in found], tokens)
