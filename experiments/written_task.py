"""An instruction-style task with written answers: reply with the right option in a fixed JSON form.

A template makes it from questions with choices. The figures are the likelihood of the whole reply, and whether the
greedy generation is exactly that reply. An untrained base does not know the form, so exact match starts near 0; a
trained model gets as many right as it can choose.
"""

import json
from collections.abc import Sequence

import jax
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder import Generator, Model
from jcrosslora.evaluate import Question
from jcrosslora.training.batches import encode

_BATCH = 16
# Lengths are rounded up to multiples of this: every further shape has to be compiled.
_STEP = 32


class Prompted(Question):
    """A question whose text is the whole prompt, for answers that are written and not chosen."""

    @property
    def prompt(self) -> str:
        """The text itself."""
        return self.question


def written_example(question: Question) -> Prompted:
    """Make the prompt and its right reply from a question with choices."""
    options = "\n".join(f"{number}. {choice}" for number, choice in enumerate(question.choices, 1))
    prompt = f"Choose the right option and reply in JSON.\nQuestion: {question.question}\n{options}\nReply:"
    right = {"option": question.answer + 1, "text": question.choices[question.answer]}
    return Prompted(prompt, (json.dumps(right, ensure_ascii=False),), 0)


def exact_matches(
    base: BaseModel, questions: Sequence[Question], adapter: Adapter | None, model: Model, tokenizer: Tokenizer
) -> np.ndarray:
    """Generate greedily, float64 (n,): 1 where the text begins with the whole right reply.

    The reply ends with a closing brace; text behind it is ignored, because training on answers does not teach a model
    to stop.
    """
    generator = Generator.of(base, adapter, model=model, tokenizer=tokenizer)
    found: list[bool] = []
    for start in range(0, len(questions), _BATCH):
        group = questions[start : start + _BATCH]
        examples = [encode(tokenizer, question) for question in group]
        prompts = [example.ids[: example.answer] for example in examples]
        shape = _BATCH, _rounded(max(map(len, prompts)))
        length = _rounded(max(example.answer_tokens for example in examples))
        written = generator.continue_tokens(prompts, length, 0.0, jax.random.key(0), shape=shape)
        found += [matches(tokenizer.decode(row), question) for row, question in zip(written, group, strict=True)]
    return np.array(found, np.float64)


def matches(text: str, question: Question) -> bool:
    """Check whether a generated text begins with the right answer."""
    return text.lstrip().startswith(question.choices[question.answer])


def _rounded(length: int) -> int:
    return -(-length // _STEP) * _STEP
