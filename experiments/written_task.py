"""An instruction-style task whose answers are written, not chosen: reply with the right option in a fixed JSON form.

It is derived by a template from questions with choices. What counts is the likelihood of the whole reply, and whether
what the model writes, taking the likeliest token each time, is that reply exactly. A base without training does not
know the form, so exact match starts near 0; a trained model gets as many right as it can choose.
"""

import json
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, pad_right
from jcrosslora.decoder import Params, sample, settings_of, stack_adapter
from jcrosslora.evaluate import Question
from jcrosslora.training import Prompted
from jcrosslora.training.examples import Encoded, encode

_BATCH = 16
# Lengths are rounded up to multiples of this: every further shape has to be compiled.
_STEP = 32


def written_example(question: Question) -> Prompted:
    """The prompt and the one right reply made from a question with choices."""
    options = "\n".join(f"{number}. {choice}" for number, choice in enumerate(question.choices, 1))
    prompt = f"Choose the right option and reply in JSON.\nQuestion: {question.question}\n{options}\nReply:"
    right = {"option": question.answer + 1, "text": question.choices[question.answer]}
    return Prompted(prompt, (json.dumps(right, ensure_ascii=False),), 0)


def exact_matches(
    base: BaseModel, questions: Sequence[Question], adapter: Adapter | None, params: Params, tokenizer: Tokenizer
) -> np.ndarray:
    """float64 (n,): 1 where the text that the model writes begins with the whole right reply.

    The reply ends with a brace that closes it; what a model writes behind it is not looked at, because training on
    answers does not teach it to stop.
    """
    settings, stacked = settings_of(base), None if adapter is None else stack_adapter(adapter, base)
    found: list[bool] = []
    for group, examples in _batches(questions, tokenizer):
        width = _rounded(max(example.first for example in examples))
        prompts, mask = pad_right([example.ids[: example.first] for example in examples], (len(examples), width))
        sampled = sample(
            settings,
            params,
            jnp.asarray(prompts),
            jnp.asarray(mask),
            length=_rounded(max(example.answer for example in examples)),
            temperature=jnp.float32(0.0),
            key=jax.random.key(0),
            adapter=stacked,
            stop_tokens=tokenizer.stops,
        )
        texts = _texts(tokenizer, np.asarray(sampled.tokens), np.asarray(sampled.valid))
        found += [matches(text, question) for text, question in zip(texts, group, strict=False)]
    return np.array(found, np.float64)


def matches(text: str, question: Question) -> bool:
    """Whether a written text begins with the right answer."""
    return text.lstrip().startswith(question.choices[question.answer])


def _batches(questions: Sequence[Question], tokenizer: Tokenizer) -> Iterator[tuple[Sequence[Question], list[Encoded]]]:
    """Questions in groups, and their tokens; the last group is filled up by repeating its last example."""
    for start in range(0, len(questions), _BATCH):
        group = questions[start : start + _BATCH]
        examples = [encode(tokenizer, question) for question in group]
        yield group, examples + [examples[-1]] * (_BATCH - len(examples))


def _texts(tokenizer: Tokenizer, tokens: np.ndarray, valid: np.ndarray) -> Iterator[str]:
    for row, mask in zip(tokens, valid, strict=True):
        yield tokenizer.decode(row[mask & ~np.isin(row, tokenizer.stops)])


def _rounded(length: int) -> int:
    return -(-length // _STEP) * _STEP
