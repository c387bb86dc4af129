"""Prompt templates: write prompts and answers in them, and find the templates that an adapter was trained on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
import numpy as np

from jcrosslora.checkpoint import Tokenizer
from jcrosslora.distill.settings import End
from jcrosslora.distill.sources import Compared, Source, Writer
from jcrosslora.text import Completion, Message, Prompt, read, render
from jcrosslora.utils.cost import TEXT, Cost
from jcrosslora.utils.progress import Track

# First words of prompts, asking and telling.
_OPENERS = (
    *("What", "Which", "How", "Why", "When", "Where", "Who", "If", "A", "The", "In", "Which of the following"),
    *("Explain", "Describe", "Write", "Name", "Give", "List"),
)
# A full stop inside a number or a name has no space after it; the others are those of Chinese, Japanese and Hindi.
_SENTENCE_END = re.compile(r"[?!]|\.(?=\s|$)|[\uff1f\uff01\u3002\u0964]")
_FEWEST_WORDS = 4  # of a prompt
PROMPT_TOKENS, _PROMPT_TEMPERATURE = 32, 0.7
_ERRORS = 2.0  # standard errors that a template may be below the best
_MOST = 3  # templates of a fit


@dataclass(frozen=True)
class PromptTemplate:
    """The text before a question or an instruction, and between it and its answer."""

    before: str
    after: str

    @property
    def name(self) -> str:
        """What reports call it: the word that it begins with."""
        return repr(self.before.strip())

    def wrap(self, text: str) -> Prompt:
        """Make a prompt of a question or an instruction."""
        return self.before + text + self.after

    def unwrap(self, prompt: Prompt) -> str:
        """Return the question or the instruction of a prompt of this template."""
        assert isinstance(prompt, str)
        return prompt.removeprefix(self.before).removesuffix(self.after)

    def answer(self, text: str) -> str:
        """Put an answer on a new line, or after a space."""
        return ("" if self.after.endswith("\n") else " ") + text.lstrip()


@dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """A base's own chat template, with one message of the user."""

    @property
    def name(self) -> str:
        """What reports call it."""
        return "its chat template"

    def wrap(self, text: str) -> Prompt:
        """Make a message of a question or an instruction."""
        return (Message("user", text),)

    def unwrap(self, prompt: Prompt) -> str:
        """Return the question or the instruction of a message."""
        assert not isinstance(prompt, str)
        return prompt[-1].content

    def answer(self, text: str) -> str:
        """Drop the space before an answer, which chat templates do not have."""
        return text.lstrip()


TEMPLATES = (
    PromptTemplate("Question: ", "\nAnswer:"),
    PromptTemplate("Q: ", "\nA:"),
    PromptTemplate("User: ", "\nAssistant:"),
    PromptTemplate("### Instruction:\n", "\n\n### Response:\n"),
    PromptTemplate("Instruction: ", "\nResponse:"),
    PromptTemplate("Input: ", "\nOutput:"),
    PromptTemplate("Problem: ", "\nSolution:"),
    PromptTemplate("Task: ", "\nResult:"),
)


def templates_of(tokenizer: Tokenizer) -> tuple[PromptTemplate, ...]:
    """List the templates that an adapter may have been trained on: the common ones, and the base's own."""
    if tokenizer.chat_template is None:
        return TEMPLATES
    rendered = render(tokenizer, (Message("user", "Question"),), ask=True)
    first, last = rendered.spans[0]
    return (*TEMPLATES, ChatTemplate(without_bos(tokenizer, rendered.text[:first]), rendered.text[last:]))


def without_bos(tokenizer: Tokenizer, text: str) -> str:
    """Remove the BOS token from a rendered conversation if it is added to plain text as well."""
    return text if tokenizer.bos is None else text.removeprefix(tokenizer.bos_name)


@dataclass(frozen=True)
class Sampler:
    """How the answers of a fit are sampled.

    Attributes:
        count: how many to sample before the fit.
        tokens: the most tokens of an answer; None if that is still to be learnt.
        end: see `DistillSettings.end`.
    """

    count: int = 300
    tokens: int | None = None
    temperature: float = 1.0
    seed: int = 0
    end: End = "source"

    @property
    def varied(self) -> Self:
        """The same for prompts that are answered again: at temperature 0 every answer would be the same."""
        return self if self.temperature > 0 else replace(self, temperature=1.0)

    def answer_both(
        self,
        writer: Writer,
        prompts: Sequence[Completion],
        repeated: Sequence[Completion],
        turn: int = 0,
        bar: Track | None = None,
    ) -> list[Completion]:
        """Answer prompts, and prompts that are answered again, which are always sampled."""
        if self.varied is self:
            return self.answer(writer, [*prompts, *repeated], turn, bar)
        return self.answer(writer, prompts, turn, bar) + self.varied.answer(writer, repeated, turn, bar)

    def answer(
        self,
        writer: Writer,
        prompts: Sequence[Completion],
        turn: int = 0,
        bar: Track | None = None,
        tokens: int | None = None,
    ) -> list[Completion]:
        """Add answers to prompts; leave out prompts that get none. Errors are those of `Generator.continue_tokens`.

        The turn is added to the seed. Answers have at most `tokens`; None takes `self.tokens`.
        """
        if not prompts:
            return []
        key, most = jax.random.fold_in(jax.random.key(self.seed + turn), 1), tokens or self.tokens
        assert most is not None
        written = writer.write([item.prompt for item in prompts], most, self.temperature, key, bar=bar)
        return [
            replace(item, answer=one.text, ended=one.ended, greedy=self.temperature == 0)
            for item, one in zip(prompts, written, strict=True)
            if one.text.strip()
        ]


def first_sentence(text: str) -> str:
    """Return the first sentence with the mark that ends it, if the first line has one; else nothing."""
    line = text.split("\n", 1)[0]
    found = _SENTENCE_END.search(line)
    return line[: found.end()] if found else ""


def write_prompts(
    writer: Writer, templates: Sequence[PromptTemplate], seed: int, bar: Track | None
) -> list[Completion]:
    """Write a prompt of one sentence for each template; leave out those that are too short or not finished."""
    rng = np.random.default_rng(seed)
    openers = [_OPENERS[place] for place in rng.permutation(np.arange(len(templates)) % len(_OPENERS))]
    starts = [template.before + opener for template, opener in zip(templates, openers, strict=True)]
    written = writer.write(starts, PROMPT_TOKENS, _PROMPT_TEMPERATURE, jax.random.key(seed), bar=bar)
    found = []
    for template, opener, one in zip(templates, openers, written, strict=True):
        # A turn that the base itself ended is a whole prompt.
        end = first_sentence(one.text) or (one.text.split("\n", 1)[0] if one.ended else "")
        if end and len((opener + end).split()) >= _FEWEST_WORDS:
            found.append(Completion(template.wrap(opener + end), origin=template.name))
    return found


def judge_templates(source: Source, completions: Sequence[Completion], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Measure an adapter on the same completions in each template of its base (`templates_of`).

    The completions are the same because figures differ more between completions than between templates. The origins of
    the n completions are the names of their templates. The figures are the change and the base NLL of `compare`,
    float64 (templates, n) each.
    """
    templates = templates_of(source.tokenizer)
    named = {template.name: template for template in templates}
    moved = [in_template(item, named[item.origin], template) for template in templates for item in completions]
    change, base_nll, _ = compare(source, moved, tokens)
    return change.reshape(len(templates), -1), base_nll.reshape(len(templates), -1)


def in_template(completion: Completion, own: PromptTemplate, other: PromptTemplate) -> Completion:
    """Put a completion of one template into another."""
    prompt, answer = other.wrap(own.unwrap(completion.prompt)), other.answer(completion.answer)
    return replace(completion, prompt=prompt, answer=answer, origin=other.name)


def known_templates(
    templates: Sequence[PromptTemplate], change: np.ndarray, base_nll: np.ndarray
) -> list[PromptTemplate]:
    """Choose the templates that an adapter was probably trained on: at most 3, in their order.

    An adapter changes its base's predictions in all templates, and most where its answers are least likely under the
    base. A change beyond that comes from training. So this takes the template with the largest (change - base NLL), and
    those at most two standard errors below it. The figures are those of `judge_templates`.
    """
    if not (change.size and np.isfinite(change).all()):
        return []
    behind = behind_best(change, base_nll)
    means, errors = behind.mean(axis=1), behind.std(axis=1) / np.sqrt(behind.shape[1])
    near = [place for place in np.argsort(means, kind="stable").tolist() if means[place] <= _ERRORS * errors[place]]
    return [templates[place] for place in sorted(near[:_MOST])]


def behind_best(change: np.ndarray, base_nll: np.ndarray) -> np.ndarray:
    """Return how far change - base_nll is below the template with the largest mean, (templates, n)."""
    scores = change - base_nll
    return scores[scores.mean(axis=1).argmax()] - scores


def comparing_cost(texts: int) -> Cost:
    """Count `compare` on texts, with the adapter and without."""
    return Cost(source=2 * texts * TEXT)


def compare(source: Source, completions: Sequence[Completion], tokens: int) -> Compared:
    """Compare the predictions with and without the adapter on the first tokens of each completion's answer."""
    found = [read(source.tokenizer, replace(item, ended=False)) for item in completions]
    # Tokens after the last of these do not change their predictions, but take time.
    return source.compare([one.ids[: one.answer + tokens] for one in found], [one.answer for one in found], tokens)
