"""Score the choices of questions under a base and its adapters: accuracy and likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import Model
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.bootstrap import Evaluated, Interval, ratios
from jcrosslora.evaluate.examples import Question, read_task
from jcrosslora.evaluate.log_probs import Models, log_prob_sums, tokenize
from jcrosslora.evaluate.packing import Tokens

FIGURES = ("accuracy", "accuracy_norm", "nll_per_char", "nll_pooled")


@dataclass(frozen=True, eq=False)
class Scores(Evaluated):
    """Scores of n questions with C choices at most, under A models: the base first, then its adapters.

    Attributes:
        names: (A,) names of the models.
        log_probs: float64 (A, n, C), sum of the log-probabilities of a choice's tokens, in nats; NaN if a question
            has fewer choices.
        characters: int64 (n, C), code points of a choice, without the space in front; 0 if there is none.
        tokens: int64 (n, C), tokens of a choice; 0 if there is none.
        answers: int64 (n,), index of the right choice.
    """

    names: tuple[str, ...]
    log_probs: np.ndarray
    characters: np.ndarray
    tokens: np.ndarray
    answers: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], questions: Sequence[Question], log_probs: np.ndarray, tokens: np.ndarray) -> Self:
        """Take characters and answers from the questions."""
        characters = np.zeros(tokens.shape, np.int64)
        for row, question in zip(characters, questions, strict=True):
            row[: len(question.choices)] = [len(choice) for choice in question.choices]
        answers = np.array([question.answer for question in questions], np.int64)
        return cls(tuple(names), log_probs, characters, tokens, answers)

    def accuracy(self) -> np.ndarray:
        """Return the share of questions whose right choice has the highest log-probability, float64 (A,)."""
        return self.by_question("accuracy").mean(axis=1)

    def accuracy_norm(self) -> np.ndarray:
        """Return the accuracy by log-probability per character of the choice, float64 (A,)."""
        return self.by_question("accuracy_norm").mean(axis=1)

    def nll_per_char(self) -> np.ndarray:
        """Return the mean over questions of -log p(right choice) / its characters, in nats, float64 (A,)."""
        return self.by_question("nll_per_char").mean(axis=1)

    def nll_pooled(self) -> np.ndarray:
        """Return -log p of all right choices / all their characters, in nats, float64 (A,): long ones weigh more."""
        return self.by_question("nll_pooled").mean(axis=1)

    def by_question(self, figure: str) -> np.ndarray:
        """Return a figure of `FIGURES` of each question, float64 (A, n); accuracies are 0 or 1.

        "nll_pooled" is -log p(right choice) over the mean number of characters of all right choices.

        Raises:
            UsageError: an unknown figure.
        """
        if figure not in FIGURES:
            raise UsageError(f"figure {figure!r} is not known; known: {', '.join(FIGURES)}")
        exists = self.characters > 0
        per_char = self.log_probs / np.where(exists, self.characters, 1)
        if figure in ("nll_per_char", "nll_pooled"):
            right = np.arange(len(self.answers)), self.answers
            lengths = self.characters[right]
            return -self.log_probs[:, *right] / (lengths if figure == "nll_per_char" else lengths.mean())
        ranked = np.where(exists, self.log_probs if figure == "accuracy" else per_char, -np.inf)
        return (ranked.argmax(axis=2) == self.answers).astype(np.float64)

    values = by_question

    def bootstrap(self, figure: str, *, draws: int = 10_000, seed: int = 0) -> list[Interval]:
        """Compute the mean of a figure under each model with its interval; a pooled one is a ratio of two sums."""
        if figure != "nll_pooled":
            return super().bootstrap(figure, draws=draws, seed=seed)
        return ratios(*self._pooled(), draws=draws, seed=seed)

    def differences(self, figure: str, *, draws: int = 10_000, seed: int = 0) -> list[Interval]:
        """Compute each model's figure minus the base's with its interval, over the same resampled questions."""
        if figure != "nll_pooled":
            return super().differences(figure, draws=draws, seed=seed)
        return ratios(*self._pooled(), minus_first=True, draws=draws, seed=seed)

    def _pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Return -log p of the right choices, and their characters, float64 (A, n) each."""
        right = np.arange(len(self.answers)), self.answers
        nll = -self.log_probs[:, *right]
        return nll, np.broadcast_to(self.characters[right].astype(np.float64), nll.shape)

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of all figures."""
        return FIGURES


def score(
    base: BaseModel | str | Path | Any,
    questions: Sequence[Question] | str | Path,
    adapters: Sequence[Adapter | str | Path | Any] = (),
    *,
    dtype: DTypeLike = jnp.float32,
    batch_tokens: int = 4096,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> Scores:
    """Score every choice of every question under the base and under the base with each adapter.

    All models run in one pass over the questions, vmapped over the adapters; the base is an adapter of zeros. The
    prefix that the choices of a question share is run once. Log-probabilities are float32, their sums float64.

    Args:
        base: an open base, or anything that `open_base` accepts.
        questions: at least one, or a JSONL file (see `read_task`).
        adapters: of this base, loaded or anything that `load_adapter` accepts; applied unmerged.
        dtype: of the weights, float32 or bfloat16.
        batch_tokens: token positions in memory at once, over all adapters.
        model: the base, if it is loaded already (`jcrosslora.decoder.load_model`); then `dtype` is not used.
        tokenizer: of the base, if it is loaded already.

    Raises:
        UsageError: no question, batch_tokens below 1, text without tokens, or more tokens than the base was trained
            for.
        AdapterError: an adapter that does not fit, or whose scores are not finite.
        CheckpointError: the base or its tokenizer cannot be read, or its scores are not finite.
    """
    base = open_base(base)
    questions = read_task(questions) if isinstance(questions, str | Path) else questions
    adapters = [load_adapter(one, base) for one in adapters]
    if not questions or batch_tokens < 1:
        raise UsageError(f"{len(questions)} questions in batches of {batch_tokens} tokens: expected 1 or more of both")
    items = read_questions(base, questions, tokenizer)
    models = Models.of(base, adapters, model, dtype)
    log_probs, tokens = log_prob_sums(models, items, batch_tokens, unit="questions")
    return Scores.of(models.names, questions, log_probs, tokens)


def read_questions(base: BaseModel, questions: Sequence[Question], tokenizer: Tokenizer | None = None) -> list[Tokens]:
    """Tokenize questions for a base.

    Raises:
        UsageError: text without tokens, or longer than the positions that the base was trained on, where its
            predictions mean nothing.
        CheckpointError: the tokenizer cannot be read.
    """
    tokenizer = tokenizer or load_tokenizer(base)
    items = [tokenize(tokenizer, question) for question in questions]
    longest = base.config.get("max_position_embeddings")
    for number, (item, question) in enumerate(zip(items, questions, strict=True), 1):
        length = len(item.prefix) + max(map(len, item.tails))
        if isinstance(longest, int) and length > longest:
            msg = f"question {number} ({question.prompt[:40]!r}...) has {length:,} tokens with its longest choice, and "
            msg += f"{base.ref} reads {longest:,} at most: leave it out, or make it shorter"
            raise UsageError(msg)
    return items
