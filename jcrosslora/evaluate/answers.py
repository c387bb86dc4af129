"""Let a base and its adapters answer examples, and compare with the right answers: text, JSON, chrF, ROUGE-L.

sacrebleu computes chrF (M. Popović, chrF: character n-gram F-score for automatic MT evaluation, WMT 2015), and
rouge-score ROUGE-L (C.-Y. Lin, ROUGE: a package for automatic evaluation of summaries, 2004).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import Generator, Model, Written
from jcrosslora.decoder.generate import as_written
from jcrosslora.decoder.prompt_batches import LONGEST_PROMPT, PromptBatch
from jcrosslora.decoder.prompt_queue import write_queue
from jcrosslora.decoder.row_adapters import RowAdapters
from jcrosslora.decoder.sampling import State
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.bootstrap import Evaluated
from jcrosslora.evaluate.examples import Example, as_completion, read_examples
from jcrosslora.evaluate.log_probs import Models, likeliest_by_question, scored_tokens, summed
from jcrosslora.evaluate.packing import Tokens
from jcrosslora.text import Completion, read
from jcrosslora.text.reading import prompt_ids
from jcrosslora.utils.progress import track

# Modules of the extra `scores`, by the figure that needs them.
LIBRARIES = {"chrf": "sacrebleu", "rouge_l": "rouge_score"}
_MORE, _MOST = 16, 512  # tokens of an answer beyond the longest right one, and at most


def exact(text: str, references: Sequence[str]) -> float:
    """Return 1 if a text is one of the references, up to surrounding space; else 0."""
    return float(text.strip() in [reference.strip() for reference in references])


def equal_json(text: str, references: Sequence[str]) -> float:
    """Return 1 if a text and one of the references are JSON of the same value; else 0.

    The order of keys and the way a number is written do not matter; the order of a list does.
    """
    found = parse_json(text)
    values = [parse_json(reference) for reference in references]
    return float(found is not None and any(value is not None and _same(found[0], value[0]) for value in values))


def chrf(text: str, references: Sequence[str]) -> float:
    """Compute chrF against the nearest of the references, 0 to 100."""
    return float(_scorer("chrf").sentence_score(text.strip(), [one.strip() for one in references]).score)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Compute the F-measure of ROUGE-L against the nearest of the references, 0 to 1.

    Words are runs of a to z and digits, in lower case and without stemming; other letters count as space.
    """
    return float(_scorer("rouge_l").score_multi(list(references), text)["rougeL"].fmeasure)


def parse_json(text: str) -> tuple[Any] | None:
    """Read JSON, strictly; return its value as a tuple of one, or None if the text is not JSON."""
    try:
        return (json.loads(text.strip(), parse_constant=_refuse),)
    except (ValueError, RecursionError):
        return None


def installed(figure: str) -> bool:
    """Check whether the library that a figure needs is installed; True for a figure that needs none."""
    return figure not in LIBRARIES or find_spec(LIBRARIES[figure]) is not None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    # In Python, but not in JSON, True is 1.
    return isinstance(one, bool) == isinstance(other, bool) and one == other


@cache
def _scorer(figure: str) -> Any:
    """Make the scorer of "chrf" or "rouge_l"."""
    try:
        if figure == "chrf":
            return import_module("sacrebleu.metrics").CHRF()
        return import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    except ImportError as error:
        msg = f"figure {figure!r} needs the package {LIBRARIES[figure].replace('_', '-')} ({error}): "
        msg += "pip install 'jcrosslora[scores]'"
        raise UsageError(msg) from error


_OF_TEXTS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "json": equal_json,
    "chrf": chrf,
    "rouge_l": rouge_l,
}
# An answer that was cut off cannot be right as a whole: nothing shows where it would end.
_ENDED_ONLY = ("exact", "json")
ANSWER_FIGURES = (*_OF_TEXTS, "ended", "nll_per_char")


@dataclass(frozen=True, eq=False)
class Answers(Evaluated):
    """Answers to n examples under A models: the base first, then its adapters.

    Attributes:
        names: (A,) names of the models.
        examples: (n,) the prompts with their right answers.
        written: (A,) of (n,), each model's completions of the prompts.
        nll: float64 (A, n), -log p(right answer) in nats, including the token that ends it.
        max_new_tokens: tokens at which an answer was cut off.
    """

    names: tuple[str, ...]
    examples: tuple[Completion, ...]
    written: tuple[tuple[Written, ...], ...]
    nll: np.ndarray
    max_new_tokens: int
    _computed: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """(A,) of (n,): the written answers, without space around them."""
        return tuple(tuple(one.text.strip() for one in row) for row in self.written)

    @property
    def ended(self) -> np.ndarray:
        """Bool (A, n): whether the model ended its answer; else it was cut off."""
        return np.array([[one.ended for one in row] for row in self.written], bool)

    @property
    def references(self) -> tuple[tuple[str, ...], ...]:
        """(n,): the right answers to each example, the one in the conversation first."""
        return tuple(
            tuple(dict.fromkeys(text.strip() for text in (one.answer, *one.references))) for one in self.examples
        )

    @property
    def figures(self) -> tuple[str, ...]:
        """The figures that apply.

        "json" needs right answers that are all JSON; "chrf" and "rouge_l" need their libraries.
        """
        json = all(parse_json(text) is not None for texts in self.references for text in texts)
        return tuple(one for one in ANSWER_FIGURES if installed(one) and (json or one != "json"))

    def by_example(self, figure: str) -> np.ndarray:
        """Return a figure of each example as float64 (A, n).

        - "exact": 1 if the answer ended and is one of the right ones, up to surrounding space.
        - "json": 1 if the answer ended and is JSON of the same value as a right one.
        - "chrf": chrF against the nearest right answer, 0 to 100.
        - "rouge_l": F-measure of ROUGE-L against the nearest right answer, 0 to 1; for English.
        - "ended": 1 if the model ended its answer.
        - "nll_per_char": `nll` over the characters of the answer, in nats.

        Raises:
            UsageError: an unknown figure, or one whose library is not installed.
        """
        if figure not in ANSWER_FIGURES:
            raise UsageError(f"figure {figure!r} is not known; known: {', '.join(ANSWER_FIGURES)}")
        if figure not in self._computed:
            self._computed[figure] = self._compute(figure)
        return self._computed[figure]

    values = by_example

    def _compute(self, figure: str) -> np.ndarray:
        if figure == "ended":
            return self.ended.astype(np.float64)
        if figure == "nll_per_char":
            return self.nll / [len(one.answer.strip()) for one in self.examples]
        of_text, references = _OF_TEXTS[figure], self.references
        found = np.array([[of_text(*pair) for pair in zip(row, references, strict=True)] for row in self.texts])
        return np.where(self.ended, found, 0.0) if figure in _ENDED_ONLY else found


def answer(
    base: BaseModel | str | Path | Any,
    examples: Sequence[Example] | str | Path,
    adapters: Sequence[Adapter | str | Path | Any] = (),
    *,
    max_new_tokens: int | None = None,
    dtype: DTypeLike = jnp.float32,
    batch_tokens: int = 4096,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> Answers:
    """Answer each example greedily, with the base alone and with each adapter.

    Also computes the likelihood of the right answer, including the token that ends it. Conversations are formatted
    with the base's chat template.

        found = jcl.answer("models/gemma-3-270m", "test.jsonl", ["moved", "trained"])
        found.bootstrap("exact"), found.lift("exact", 1, 2)

    Args:
        base: an open base, or anything that `open_base` accepts.
        examples: at least one, or a JSONL file (see `read_examples`); a question's right choice is its answer.
        adapters: of this base, loaded or anything that `load_adapter` accepts; applied unmerged.
        max_new_tokens: tokens at which an answer is cut off; None takes 16 more than the longest right answer has, at
            most 512.
        dtype: of the weights, float32 or bfloat16.
        batch_tokens: token positions in memory at once for the likelihoods, over all adapters.
        model: the base, if it is loaded already (`jcrosslora.decoder.load_model`); then `dtype` is not used.
        tokenizer: of the base, if it is loaded already.

    Raises:
        UsageError: no example, one without an answer, max_new_tokens or batch_tokens below 1, a text longer than the
            base reads, or messages that its chat template refuses.
        AdapterError: an adapter that does not fit, or whose predictions are not finite.
        CheckpointError: the base or its tokenizer cannot be read, or its predictions are not finite.
    """
    base = open_base(base)
    found = read_examples(examples) if isinstance(examples, str | Path) else examples
    completions = tuple(map(as_completion, found))
    adapters = [load_adapter(one, base) for one in adapters]
    if not completions or batch_tokens < 1:
        raise UsageError(f"{len(completions)} examples in batches of {batch_tokens} tokens: expected 1 or more of both")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"answers of {max_new_tokens} tokens: expected 1 or more")
    tokenizer = tokenizer or load_tokenizer(base)
    items = [_tokens(base, tokenizer, one, number) for number, one in enumerate(completions, 1)]
    room = max_new_tokens or _room(tokenizer, completions)
    models = Models.of(base, adapters, model, dtype)
    with track(len(items), "score", "examples") as bar:
        scored = list(scored_tokens(models, items, batch_tokens, bar))
    sums, _ = summed(models, items, scored)
    prompts = [prompt_ids(tokenizer, one.prompt) for one in completions]
    own = likeliest_by_question(scored, len(items))
    begun = [_begun(*of_one, room, tokenizer) for of_one in zip(prompts, items, own, strict=True)]
    written = _write(models, tokenizer, prompts, [row for rows in zip(*begun, strict=True) for row in rows], room)
    return Answers(models.names, completions, written, -sums[:, :, 0], room)


def _write(
    models: Models,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    begun: Sequence[np.ndarray],
    max_new_tokens: int,
) -> tuple[tuple[Written, ...], ...]:
    """Answer n prompts with all models, in one queue if their adapters can be batched, else in one per model.

    `begun` holds the first tokens of the answers, as for `write_queue`; the base's answers come first.
    """
    names, count, together = models.names, len(prompts), models.by_row()
    with track(models.count * count, "write answers", "answers") as bar:
        if together is not None:
            writer = _Writer(together, tokenizer, names[0], None, names, count)
            rows = write_queue(writer, prompts, max_new_tokens, begun, bar=bar)
        else:
            own = [
                Generator(models.one(place), tokenizer, names[0], names[place] if place else None)
                for place in range(models.count)
            ]
            parts = [begun[start : start + count] for start in range(0, len(begun), count)]
            queues = zip(own, parts, strict=True)
            rows = [row for one, part in queues for row in write_queue(one, prompts, max_new_tokens, part, bar=bar)]
    written = [as_written(tokenizer, prompts[place % count], row) for place, row in enumerate(rows)]
    return tuple(tuple(written[start : start + count]) for start in range(0, len(written), count))


@dataclass(frozen=True, eq=False)
class _Writer(Generator):
    """Answers `count` prompts with the models `names` at once; the base's answers come first."""

    names: tuple[str, ...] = ()
    count: int = 0

    def of_rows(self, places: Sequence[int], rows: int) -> Self:
        """Return a generator for rows of several models."""
        del rows
        return self._of([place // self.count for place in places])

    def begin(self, batch: PromptBatch, room: int, *, pad_left: bool) -> State:
        """Read the prompts of a batch, all of one model."""
        return super(_Writer, self._of([batch.places[0] // self.count])).begin(batch, room, pad_left=pad_left)

    def _of(self, models: Sequence[int]) -> Self:
        adapters = self.model.adapter
        assert isinstance(adapters, RowAdapters)
        chosen = adapters.of_rows([model - 1 if model else None for model in models])
        name = self.names[models[0]] if models[0] else None
        return replace(self, model=self.model.with_adapter(chosen), adapter_name=name)


def _tokens(base: BaseModel, tokenizer: Tokenizer, completion: Completion, number: int) -> Tokens:
    """Tokenize a prompt and its right answer, as a question with one choice."""
    if not completion.answer.strip():
        raise UsageError(f"example {number} has no answer: give the right one to compare with")
    found = read(tokenizer, completion)
    longest = base.config.get("max_position_embeddings")
    whole = "with its answer", len(found.ids), longest
    prompt = "in front of its answer", found.answer, LONGEST_PROMPT
    for what, length, most in (whole, prompt):
        if isinstance(most, int) and length > most:
            msg = f"example {number} has {length:,} tokens {what}, and at most {most:,} are read with {base.ref}: "
            raise UsageError(msg + "leave it out, or make it shorter")
    cut = found.answer - 1
    return Tokens(found.ids[:cut], (found.ids[cut:],), (1,))


def _begun(
    prompt: np.ndarray, item: Tokens, likeliest: np.ndarray, most: int, tokenizer: Tokenizer
) -> list[np.ndarray]:
    """Return the known first tokens of A models' answers to a prompt, at most `most` each.

    `likeliest`, int32 (A, T), holds the argmax tokens along the right answer: a model's answer follows them up to its
    first deviation. Nothing is known if the prompt has other tokens with an answer after it.
    """
    (tail,) = item.tails
    if not np.array_equal(np.append(item.prefix, tail[0]), prompt):
        return [np.zeros(0, np.int32)] * len(likeliest)
    last = (likeliest != tail[1:]) | np.isin(tail[1:], tokenizer.stops)
    ends = [int(np.flatnonzero(row)[0]) + 1 if row.any() else len(row) for row in last]
    most = min(most, LONGEST_PROMPT - len(prompt))
    return [row[: min(end, most)] for row, end in zip(likeliest, ends, strict=True)]


def _room(tokenizer: Tokenizer, completions: Sequence[Completion]) -> int:
    """Return the maximum number of tokens of an answer: 16 more than the longest right answer, at most 512."""
    texts = [text for one in completions for text in (one.answer, *one.references)]
    return min(_MOST, _MORE + max(len(tokenizer.encode(text, special=False).ids) for text in texts))
