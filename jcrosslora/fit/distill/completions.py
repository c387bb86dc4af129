"""Prompts and answers that a base writes with an adapter: the text on which the adapter shows what it does.

Text that begins anywhere shows little of an adapter that was trained on the answers to prompts. So the base is led to
where prompts end: it writes one in each of the common templates of prompt and answer, and answers it. Which templates the
adapter knows is seen from how much it changes the predictions of its base where the answer begins.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder import DecoderSettings, Params, StackedAdapter, sample
from jcrosslora.errors import not_finite

# What stands in front of a prompt and in front of its answer.
TEMPLATES = (
    ("Question: ", "\nAnswer:"),
    ("Q: ", "\nA:"),
    ("User: ", "\nAssistant:"),
    ("### Instruction:\n", "\n\n### Response:\n"),
    ("Instruction: ", "\nResponse:"),
    ("Input: ", "\nOutput:"),
    ("Problem: ", "\nSolution:"),
    ("Task: ", "\nResult:"),
)
# First words of prompts, asking and telling.
OPENERS = (
    *("What", "Which", "How", "Why", "When", "Where", "Who", "If", "A", "The", "In", "Which of the following"),
    *("Explain", "Describe", "Write", "Name", "Give", "List"),
)
# A full stop inside a number or a name has no space behind it; the others are those of Chinese, Japanese and Hindi.
_SENTENCE_END = re.compile(r"[?!]|\.(?=\s|$)|[\uff1f\uff01\u3002\u0964]")
_FEWEST = 4  # words of a prompt
_AT_ONCE = 48  # texts written together
_LONGEST, _STEP = 96, 16  # tokens of a text that are read, and what their number is rounded up to
_CONTEXT = 4  # tokens that are decoded with what follows them
_UNFINISHED = "\ufffd"  # what the bytes of a character that was cut off become


@dataclass(frozen=True)
class Completion:
    """A prompt with the answer that follows it.

    Attributes:
        prompt: all text in front of the answer.
        answer: what was written behind it.
        template: index into `TEMPLATES`; -1 for a prompt of the user's.
    """

    prompt: str
    answer: str = ""
    template: int = -1

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return self.prompt + self.answer


def in_template(completion: Completion, template: int) -> Completion:
    """A completion in one of `TEMPLATES` in another one; answers begin on a line of their own or behind a space."""
    (front, end), (before, after) = TEMPLATES[completion.template], TEMPLATES[template]
    prompt = before + completion.prompt.removeprefix(front).removesuffix(end) + after
    return Completion(prompt, ("" if after.endswith("\n") else " ") + completion.answer.lstrip(), template)


class Writer:
    """A base that continues texts with an adapter.

    Attributes:
        settings: of the base.
        params: its weights.
        tokenizer: its tokenizer.
        adapter: stacked, or None.
        name: of the base, for messages.
        adapter_name: of the adapter, for messages; None without one.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        params: Params,
        tokenizer: Tokenizer,
        adapter: StackedAdapter | None,
        *,
        name: str = "the base",
        adapter_name: str = "the adapter",
    ) -> None:
        self.settings, self.params, self.tokenizer = settings, params, tokenizer
        self.adapter, self.name = adapter, name
        self.adapter_name = None if adapter is None else adapter_name

    def extend(self, texts: Sequence[str], length: int, temperature: float, key: jax.Array) -> list[str]:
        """What follows each text, `length` tokens at most. Of a text that is longer the last 96 tokens are read.

        Raises:
            AdapterError: with the adapter the base's predictions are not finite.
            CheckpointError: they are not, and there is no adapter.
        """
        ids = [self.tokenizer.encode(text).ids[-_LONGEST:] for text in texts]
        found = [""] * len(ids)
        # Texts of one width together: every token of padding in front costs as much as one of text.
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        for start in range(0, len(ids), _AT_ONCE):
            places = order[start : start + _AT_ONCE]
            written = self._batch([ids[place] for place in places], length, temperature, key)
            key = jax.random.fold_in(key, start)
            for place, text in zip(places, written, strict=True):
                found[place] = text
        return found

    def _batch(self, ids: Sequence[np.ndarray], length: int, temperature: float, key: jax.Array) -> list[str]:
        width = -(-len(ids[-1]) // _STEP) * _STEP
        prompts, mask = np.zeros((_AT_ONCE, width), np.int32), np.zeros((_AT_ONCE, width), bool)
        # Rows that are not used hold one token: every row has to.
        prompts[:, -1], mask[:, -1] = ids[0][-1], True
        for row, own in enumerate(ids):
            prompts[row, width - len(own) :], mask[row, width - len(own) :] = own, True
        written = sample(
            self.settings,
            self.params,
            jnp.asarray(prompts),
            jnp.asarray(mask),
            length=length,
            temperature=jnp.float32(temperature),
            key=key,
            adapter=self.adapter,
            stop_tokens=self.tokenizer.stops,
        )
        if not np.asarray(written.finite)[: len(ids)].all():
            raise not_finite(self.name, self.adapter_name)
        tokens, valid = np.asarray(written.tokens), np.asarray(written.valid)
        valid = valid & ~np.isin(tokens, np.asarray(self.tokenizer.stops))
        return [self._behind(own, tokens[row][valid[row]]) for row, own in enumerate(ids)]

    def _behind(self, before: np.ndarray, written: np.ndarray) -> str:
        # Decoded together: a tokenizer may drop the space in front of what it decodes first.
        head = self.tokenizer.decode(before[-_CONTEXT:])
        return self.tokenizer.decode([*before[-_CONTEXT:], *written])[len(head) :].rstrip(_UNFINISHED)


def write_prompts(
    writer: Writer, templates: Sequence[int], seed: int, *, length: int = 32, temperature: float = 0.7
) -> list[Completion]:
    """One prompt of one sentence, still without an answer, for each of the given templates.

    Those that are too short, or not finished after `length` tokens, are left out.
    """
    rng = np.random.default_rng(seed)
    openers = rng.permutation(np.arange(len(templates)) % len(OPENERS))
    starts = [TEMPLATES[template][0] + OPENERS[opener] for template, opener in zip(templates, openers, strict=True)]
    written = writer.extend(starts, length, temperature, jax.random.key(seed))
    found = []
    for template, start, text in zip(templates, starts, written, strict=True):
        end = first_sentence(text)
        prompt = start + end
        if end and len(prompt.removeprefix(TEMPLATES[template][0]).split()) >= _FEWEST:
            found.append(Completion(prompt + TEMPLATES[template][1], template=template))
    return found


def answer(
    writer: Writer, prompts: Sequence[Completion], seed: int, *, length: int = 24, temperature: float = 1.0
) -> list[Completion]:
    """The same completions with answers."""
    texts = [prompt.prompt for prompt in prompts]
    written = writer.extend(texts, length, temperature, jax.random.fold_in(jax.random.key(seed), 1))
    return [
        Completion(prompt.prompt, text, prompt.template) for prompt, text in zip(prompts, written, strict=True) if text
    ]


def first_sentence(text: str) -> str:
    """Up to and with the first mark that ends a sentence, within the first line; nothing if there is none."""
    line = text.split("\n", 1)[0]
    found = _SENTENCE_END.search(line)
    return line[: found.end()] if found else ""
