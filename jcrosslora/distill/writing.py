"""Write prompts of one sentence in a template, and answer prompts."""

import re
from collections.abc import Sequence

import jax
import numpy as np

from jcrosslora.decoder import Written
from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.sources.protocol import Writer
from jcrosslora.distill.templates import PromptTemplate
from jcrosslora.text import Completion
from jcrosslora.utils.cost import Cost
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
    return [_answered(item, one) for item, one in zip(prompts, written, strict=True) if one.text.strip()]


def _answered(prompt: Completion, written: Written) -> Completion:
    return Completion(prompt.prompt, written.text, written.ended, prompt.origin)
