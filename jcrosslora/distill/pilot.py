"""Write prompts in templates, answer them, and find by the answers which templates an adapter was trained on."""

import re
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.sources.protocol import Compared, Source, Writer
from jcrosslora.distill.templates import PromptTemplate, in_template, templates_of
from jcrosslora.text import Completion, read
from jcrosslora.utils.cost import TEXT, Cost
from jcrosslora.utils.progress import Track

# First words of prompts, asking and telling.
_OPENERS = (
    *("What", "Which", "How", "Why", "When", "Where", "Who", "If", "A", "The", "In", "Which of the following"),
    *("Explain", "Describe", "Write", "Name", "Give", "List"),
)
# A full stop inside a number or a name has no space behind it; the others are those of Chinese, Japanese and Hindi.
_SENTENCE_END = re.compile(r"[?!]|\.(?=\s|$)|[\uff1f\uff01\u3002\u0964]")
_FEWEST_WORDS = 4  # of a prompt
_PROMPT_TOKENS, _PROMPT_TEMPERATURE = 32, 0.7
_ERRORS = 2.0  # standard errors by which a template may lie behind the best
_MOST = 3  # templates of a fit


def first_sentence(text: str) -> str:
    """Return the first sentence with the mark that ends it, if the first line has one; else nothing."""
    line = text.split("\n", 1)[0]
    found = _SENTENCE_END.search(line)
    return line[: found.end()] if found else ""


def prompts_cost(count: int) -> Cost:
    """Count `write_prompts` for so many templates."""
    return writing_cost(count, _PROMPT_TOKENS)


def write_prompts(
    writer: Writer, templates: Sequence[PromptTemplate], seed: int, bar: Track | None
) -> list[Completion]:
    """Write a prompt of one sentence for each template; leave out those that are too short or not finished."""
    rng = np.random.default_rng(seed)
    openers = [_OPENERS[place] for place in rng.permutation(np.arange(len(templates)) % len(_OPENERS))]
    starts = [template.before + opener for template, opener in zip(templates, openers, strict=True)]
    written = writer.write(starts, _PROMPT_TOKENS, _PROMPT_TEMPERATURE, jax.random.key(seed), bar=bar)
    found = []
    for template, opener, one in zip(templates, openers, written, strict=True):
        # A turn that the base itself ended is a whole prompt.
        end = first_sentence(one.text) or (one.text.split("\n", 1)[0] if one.ended else "")
        if end and len((opener + end).split()) >= _FEWEST_WORDS:
            found.append(Completion(template.wrap(opener + end), origin=template.name))
    return found


def answer_prompts(
    writer: Writer, prompts: Sequence[Completion], tokens: int, temperature: float, seed: int, bar: Track | None
) -> list[Completion]:
    """Add answers to prompts; leave out prompts that get none.

    Raises:
        AdapterError, CheckpointError: see `Generator.continue_tokens`.
    """
    key = jax.random.fold_in(jax.random.key(seed), 1)
    written = writer.write([item.prompt for item in prompts], tokens, temperature, key, bar=bar)
    return [
        replace(item, answer=one.text, ended=one.ended)
        for item, one in zip(prompts, written, strict=True)
        if one.text.strip()
    ]


def judge_templates(source: Source, completions: Sequence[Completion], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Measure an adapter in each of `templates_of` its base on the same completions, put into one after the other.

    The figures then differ by the template alone: they differ more between completions than between templates. The
    origins of the n completions are the names of their templates.

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
