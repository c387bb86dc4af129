"""Generate text: a model with a tokenizer continues prompts, in batches of few shapes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder.loading import fast_dtype, load_model
from jcrosslora.decoder.model import Model, stack_adapter
from jcrosslora.decoder.prompt_batches import LONGEST_PROMPT, WRITING_ROWS, PromptBatch, padded, plan_batches, rounded
from jcrosslora.decoder.prompt_queue import write_queue
from jcrosslora.decoder.sampling import Behind, Sampling, State, amplified, extend, extend_amplified, prefill
from jcrosslora.errors import UsageError, not_finite
from jcrosslora.text import Prompt, last_tokens, prompt_ids
from jcrosslora.utils.progress import Track

_BLOCK = 16  # tokens between two checks for stop strings
_CONTEXT = 4  # last prompt tokens that are decoded together with the new ones
UNFINISHED = "\ufffd"  # decoded from the bytes of an incomplete character


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    Attributes:
        text: without the stop token and without an incomplete character.
        tokens: number of tokens, including the stop token.
        ended: whether the model wrote a stop token; otherwise the text was cut off.
    """

    text: str
    tokens: int
    ended: bool


def as_written(tokenizer: Tokenizer, prompt: np.ndarray, row: np.ndarray) -> Written:
    """Decode the tokens `row`, int32 (N,), that a model wrote after a prompt."""
    ended = bool(len(row)) and int(row[-1]) in tokenizer.stops
    # Decode with some of the prompt, because a tokenizer may drop the space before its first token. A context that
    # begins inside a character would spoil the text after it, so it is made longer.
    size = _CONTEXT
    while size < len(prompt) and tokenizer.decode(prompt[-size:]).startswith(UNFINISHED):
        size *= 2
    context = prompt[-size:]
    text = tokenizer.decode([*context, *row[: len(row) - ended]])[len(tokenizer.decode(context)) :]
    return Written(text.rstrip(UNFINISHED), len(row), ended)


def cut_ids(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """Tokenize prompts, int32 (T,) each, and keep at most the last `LONGEST_PROMPT` tokens (see `last_tokens`)."""
    return [last_tokens(tokenizer, prompt_ids(tokenizer, prompt), LONGEST_PROMPT) for prompt in prompts]


def count_cut(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> int:
    """Count the prompts that are longer than `LONGEST_PROMPT`."""
    return sum(len(prompt_ids(tokenizer, prompt)) > LONGEST_PROMPT for prompt in prompts)


@dataclass(frozen=True, eq=False)
class Generator:
    """A base model that continues prompts, alone or with an adapter.

    Attributes:
        name: the base's name, for error messages.
        adapter_name: the adapter's name, for error messages; None without an adapter.
    """

    model: Model
    tokenizer: Tokenizer
    name: str
    adapter_name: str | None = None

    @classmethod
    def of(
        cls,
        base: BaseModel,
        adapter: Adapter | None = None,
        *,
        model: Model | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Self:
        """Load what generation needs.

        Pass the model (without an adapter) and the tokenizer if they are loaded already; otherwise the model is loaded
        in `fast_dtype()`.

        Raises:
            AdapterError: the adapter does not fit the base.
            CheckpointError: the weights or the tokenizer cannot be read.
        """
        tokenizer = tokenizer or load_tokenizer(base)
        stacked, name = (None, None) if adapter is None else (stack_adapter(adapter, base), adapter.info.name)
        model = model or load_model(base, fast_dtype())
        return cls(model.with_adapter(stacked), tokenizer, base.ref, name)

    def continue_tokens(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        temperature: float,
        key: jax.Array,
        *,
        shape: tuple[int, int] | None = None,
        until: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """Continue all prompts in one batch.

        Args:
            prompts: token ids, none empty.
            temperature: sampling temperature; 0 takes the likeliest token.
            key: from `jax.random.key`; the same key, prompts and shape give the same tokens on one kind of machine.
            shape: (B, T) to pad the prompts to, so that few shapes are compiled; None pads to the longest prompt.
            until: stop strings, checked every 16 tokens; special tokens count by name. None writes all tokens at once.

        Returns:
            int32 (T,) for each prompt: what was written, up to the first stop token (not included) or the token that
            completes a string of `until` (included).

        Raises:
            AdapterError: the predictions with the adapter are not finite.
            CheckpointError: the predictions without an adapter are not finite.
        """
        shape = shape or (len(prompts), max(map(len, prompts)))
        batch = PromptBatch(list(range(len(prompts))), [np.asarray(one) for one in prompts], shape)
        sampling = max_new_tokens, temperature, key
        rows = self._continue(batch, sampling, until, pad_left=False)
        return [row[~np.isin(row, self.tokenizer.stops)] for row in rows]

    def _continue(
        self,
        batch: PromptBatch,
        sampling: tuple[int, float, jax.Array],
        until: Sequence[str] | None = None,
        *,
        pad_left: bool,
    ) -> list[np.ndarray]:
        """Continue a batch as `continue_tokens` does; rows that ended include their stop token.

        `sampling` holds the maximum of new tokens, the temperature and the key.
        """
        max_new_tokens, temperature, key = sampling
        block = max_new_tokens if until is None else _BLOCK
        room = rounded(block * -(-max_new_tokens // block))
        state = self.begin(batch, room, pad_left=pad_left)
        rows = [np.zeros(0, np.int32) for _ in batch.texts]
        unfinished, start = list(range(len(rows))), 0
        while unfinished and start < max_new_tokens:
            size = min(self.before_switch(len(batch.texts[row]) + start, block) for row in unfinished)
            drawn = Sampling(jnp.float32(temperature), key, jnp.int32(size))
            state, *new = self.extend(state, drawn, block)
            written, valid = map(np.asarray, new)
            for row in tuple(unfinished):
                found = np.concatenate([rows[row], written[row][valid[row]]])
                end = self._end(found[:max_new_tokens], start, until or ())
                rows[row] = found[:max_new_tokens][:end]
                if end is not None or found[-1] in self.tokenizer.stops:
                    unfinished.remove(row)
            start += size
            if any(len(batch.texts[row]) + start - 1 in self.model.settings.switches for row in unfinished):
                state = self._begin_again(batch, rows, room, state, pad_left=pad_left)
        if not np.asarray(state.finite)[: len(rows)].all():
            raise not_finite(self.name, self.adapter_name)
        return rows

    def before_switch(self, length: int, most: int) -> int:
        """Count the tokens to write after a text of `length` tokens, at most `most`, before its rotations switch.

        The token that makes the text too long for the first rotations is still drawn with them, as in transformers.
        """
        return min([most, *(one + 1 - length for one in self.model.settings.switches if length <= one)])

    def _begin_again(
        self, batch: PromptBatch, rows: Sequence[np.ndarray], room: int, state: State, *, pad_left: bool
    ) -> State:
        """Read the prompts with the text written so far again: when a text switches its rotations, all keys change."""
        assert batch.beginnings is None  # see `shares_beginnings`
        texts = [np.concatenate(pair) for pair in zip(batch.texts, rows, strict=True)]
        shape = batch.shape[0], rounded(max(map(len, texts)))
        new = self.begin(PromptBatch(batch.places, texts, shape), room, pad_left=pad_left)
        return dataclasses.replace(new, count=state.count, running=state.running, finite=state.finite)

    def begin(self, batch: PromptBatch, room: int, *, pad_left: bool) -> State:
        """Read the prompts of a batch into a cache with `room` free slots after them."""
        tokens, mask = padded(batch.texts, batch.shape, pad_left)
        beginnings = batch.beginnings
        behind = None if beginnings is None else Behind(*map(jnp.asarray, beginnings.arrays(len(tokens))))
        return self._begin(jnp.asarray(tokens), jnp.asarray(mask), behind, room)

    def _begin(self, prompts: jax.Array, mask: jax.Array, behind: Behind | None, room: int) -> State:
        return prefill(self.model, prompts, mask, behind, room=room)

    @property
    def shares_beginnings(self) -> bool:
        """Whether a prefix that several prompts share can be read once.

        A recurrent state would absorb the padding after the prefix. If rotations switch with the length of a text, they
        would follow the longest prompt with the prefix.
        """
        settings = self.model.settings
        return not settings.recurrent and not settings.switches

    def extend(self, state: State, sampling: Sampling, count: int) -> tuple[State, jax.Array, jax.Array]:
        """Write up to `count` tokens, see `sampling.extend`."""
        return extend(self.model, state, sampling, count=rounded(count), stop_tokens=self.tokenizer.stops)

    def _end(self, tokens: np.ndarray, seen: int, until: Sequence[str]) -> int | None:
        """Count the tokens up to the one that completes a string of `until`; None if there is no such string."""

        def complete(count: int) -> bool:
            # Special tokens stay in the text, because `until` may name them.
            text = self.tokenizer.backend.decode(tokens[:count].tolist(), skip_special_tokens=False)
            return any(stop in text for stop in until)

        if not until or not complete(len(tokens)):
            return None
        return next(count for count in range(seen, len(tokens) + 1) if complete(count))

    def continue_texts(
        self, texts: Sequence[str], max_new_tokens: int, temperature: float, key: jax.Array, *, bar: Track | None = None
    ) -> list[str]:
        """Continue texts as `write` does; return only the new text of each."""
        return [one.text for one in self.write(texts, max_new_tokens, temperature, key, bar=bar)]

    def write(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float,
        key: jax.Array,
        *,
        bar: Track | None = None,
    ) -> list[Written]:
        """Answer prompts (texts or conversations), of which only the last 2,048 tokens are read. See `write_tokens`.

        Raises:
            UsageError: the chat template refuses a conversation, or a prompt has no token.
        """
        ids = cut_ids(self.tokenizer, prompts)
        if not all(map(len, ids)):
            raise UsageError(f"{self.name}: a prompt has no token, and the base has none to begin with: give a text")
        rows = self.write_tokens(ids, max_new_tokens, temperature, key, bar=bar)
        return [as_written(self.tokenizer, *pair) for pair in zip(ids, rows, strict=True)]

    def write_tokens(
        self, ids: Sequence[np.ndarray], max_new_tokens: int, temperature: float, key: jax.Array, *, bar: Track | None
    ) -> list[np.ndarray]:
        """Answer prompts of at most 2,048 tokens in batches of similar length: 48 prompts, or fewer long ones.

        At temperature 0, more than 48 prompts are decoded from a queue, see `write_queue`.

        A prefix that several prompts share is read once if the base allows it and that saves enough. Settings and
        errors are as in `continue_tokens`; the bar advances by one for each prompt. Returns the new tokens of each
        prompt, int32 (T,), with the stop token if there is one.
        """
        if temperature == 0 and len(ids) > WRITING_ROWS:
            return write_queue(self, ids, max_new_tokens, bar=bar)
        found = [np.zeros(0, np.int32)] * len(ids)
        start = 0
        for batch in plan_batches(ids, max_new_tokens, share=self.shares_beginnings):
            model, sampling = self.of_rows(batch.places, batch.shape[0]), (max_new_tokens, temperature, key)
            rows = model._continue(batch, sampling, pad_left=True)
            key = jax.random.fold_in(key, start)
            for place, row in zip(batch.places, rows, strict=True):
                found[place] = row
            start += len(batch.places)
            if bar is not None:
                bar.update(len(batch.places))
        return found

    def of_rows(self, places: Sequence[int], rows: int) -> Self:  # noqa: ARG002
        """Return the generator for a batch of `rows` rows, whose first rows hold the prompts at these places."""
        return self

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decode tokens without special tokens and without an incomplete character at the end."""
        return self.tokenizer.decode(tokens).rstrip(UNFINISHED)


@dataclass(frozen=True, eq=False)
class AmplifiedGenerator(Generator):
    """A base with an adapter whose change to the logits is amplified, which shows what the adapter was trained to say.

    Tokens are drawn from the logits `adapted + strength * (adapted - base)`; both models run on every token.

    Attributes:
        strength: factor of the added change; 0 samples from the adapted model.
        plausible: tokens with less than this share of the likeliest token's probability in the adapted model are not
            drawn: if both models find a token very unlikely, their difference is noise.
    """

    strength: float = 1.0
    plausible: float = 0.0

    def _begin(self, prompts: jax.Array, mask: jax.Array, behind: Behind | None, room: int) -> State:
        found, plain = (
            prefill(model, prompts, mask, behind, room=room) for model in (self.model, self.model.with_adapter(None))
        )
        scores = amplified(found.scores, plain.scores, *self._numbers)
        return State(found.count, scores, found.positions, (found.cache, plain.cache), found.running, found.finite)

    def extend(self, state: State, sampling: Sampling, count: int) -> tuple[State, jax.Array, jax.Array]:
        """Write up to `count` tokens of amplified logits, see `sampling.extend_amplified`."""
        sizes = {"count": rounded(count), "stop_tokens": self.tokenizer.stops}
        return extend_amplified(self.model, state, self._numbers, sampling, **sizes)

    @property
    def _numbers(self) -> tuple[jax.Array, jax.Array]:
        return jnp.float32(self.strength), jnp.float32(self.plausible)
