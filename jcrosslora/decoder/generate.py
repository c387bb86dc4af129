"""Generate text: one batched pass over the prompts, then a token at a time from the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder.adapters import AppliedAdapter, stack_adapter
from jcrosslora.decoder.attention import KVCache, init_cache
from jcrosslora.decoder.draw import draw
from jcrosslora.decoder.forward import extend_behind, extend_cache, logits, positions_of
from jcrosslora.decoder.params import Params, fast_dtype, load_params
from jcrosslora.decoder.prompt_batches import LONGEST, Beginnings, padded, plan_batches, rounded
from jcrosslora.decoder.settings import DecoderSettings, settings_of
from jcrosslora.errors import not_finite
from jcrosslora.text import Prompt
from jcrosslora.text.reading import prompt_ids
from jcrosslora.utils.progress import Track

_CONTEXT = 4  # tokens that are decoded together with those that follow them
Behind = tuple[jax.Array, jax.Array, jax.Array]  # beginnings, their mask and owners, see `prefill_behind`
UNFINISHED = "\ufffd"  # what the bytes of a character that was cut off decode to


@dataclass(frozen=True)
class Written:
    """What a model wrote behind a prompt.

    Attributes:
        text: without the token that ends it, and without a character that was cut off.
        tokens: how many tokens, the one that ends it included.
        ended: whether the model ended it; else it was cut off.
    """

    text: str
    tokens: int
    ended: bool


def as_written(tokenizer: Tokenizer, prompt: np.ndarray, row: np.ndarray) -> Written:
    """Decode the tokens that a model wrote, int32 (N,), behind those of a prompt."""
    ended = bool(len(row)) and int(row[-1]) in tokenizer.stops
    # Decoded together: a tokenizer may drop the space in front of what it decodes first.
    context = prompt[-_CONTEXT:]
    text = tokenizer.decode([*context, *row[: len(row) - ended]])[len(tokenizer.decode(context)) :]
    return Written(text.rstrip(UNFINISHED), len(row), ended)


@dataclass(frozen=True, eq=False)
class Generator:
    """A base model that continues prompts, alone or with an adapter.

    Attributes:
        settings: of the base.
        params: its weights.
        tokenizer: its tokenizer.
        adapter: stacked, or None.
        name: of the base, for error messages.
        adapter_name: of the adapter, likewise; None without one.
    """

    settings: DecoderSettings
    params: Params
    tokenizer: Tokenizer
    adapter: AppliedAdapter | None
    name: str
    adapter_name: str | None

    @classmethod
    def of(
        cls,
        base: BaseModel,
        adapter: Adapter | None = None,
        *,
        params: Params | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Self:
        """Load what generation needs.

        Args:
            base: the model; it needs a tokenizer.
            adapter: of this base; None for the base alone.
            params: weights of the base, if they are loaded already; None loads them in `fast_dtype()`.
            tokenizer: of the base, if it is loaded already.

        Raises:
            AdapterError: the adapter does not fit the base.
            CheckpointError: the weights or the tokenizer cannot be read.
        """
        tokenizer = tokenizer or load_tokenizer(base)
        stacked, name = (None, None) if adapter is None else (stack_adapter(adapter, base), adapter.info.name)
        params = load_params(base, fast_dtype()) if params is None else params
        return cls(settings_of(base), params, tokenizer, stacked, base.ref, name)

    def continue_tokens(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        temperature: float,
        key: jax.Array,
        *,
        shape: tuple[int, int] | None = None,
        pad_left: bool = False,
        block: int | None = None,
        until: Sequence[str] = (),
    ) -> list[np.ndarray]:
        """Continue all prompts in one batch.

        Args:
            prompts: token ids, none empty.
            max_new_tokens: the most tokens to write behind each prompt.
            temperature: of the sampling; 0 takes the likeliest token.
            key: from `jax.random.key`; the same key, prompts and shape give the same tokens on one kind of machine.
            shape: (B, T) to pad the prompts to, so that few shapes are compiled; None pads to the longest prompt.
            pad_left: whether padding goes in front of the prompts instead of behind.
            block: tokens written between two looks at `until`; None writes all at once.
            until: strings that end a text; special tokens are looked for by their names.

        Returns:
            int32 (T,) for each prompt: what was written, up to the first stop token (not included) or the token that
            completes a string of `until` (included).

        Raises:
            AdapterError: with the adapter the predictions are not finite.
            CheckpointError: the predictions are not finite, and there is no adapter.
        """
        rows = self._continue(prompts, max_new_tokens, temperature, key, shape, pad_left, block, until)
        return [row[~np.isin(row, self.tokenizer.stops)] for row in rows]

    def _continue(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        temperature: float,
        key: jax.Array,
        shape: tuple[int, int] | None,
        pad_left: bool,
        block: int | None = None,
        until: Sequence[str] = (),
        beginnings: Beginnings | None = None,
    ) -> list[np.ndarray]:
        """Continue prompts, behind beginnings if there are any, as `continue_tokens` does.

        Rows that ended hold their stop token.
        """
        tokens, mask = padded(prompts, shape or (len(prompts), max(map(len, prompts))), pad_left)
        behind = None if beginnings is None else jax.tree.map(jnp.asarray, beginnings.arrays(len(tokens)))
        block = block or max_new_tokens
        room = rounded(block * -(-max_new_tokens // block))
        state = self._begin(jnp.asarray(tokens), jnp.asarray(mask), behind, room)
        rows = [np.zeros(0, np.int32) for _ in prompts]
        unfinished = list(range(len(prompts)))
        for start in range(0, max_new_tokens, block):
            if not unfinished:
                break
            state, *new = self._extend(state, temperature, key, block)
            written, valid = map(np.asarray, new)
            for row in tuple(unfinished):
                found = np.concatenate([rows[row], written[row][valid[row]]])
                end = self._end(found[:max_new_tokens], start, until)
                rows[row] = found[:max_new_tokens][:end]
                if end is not None or found[-1] in self.tokenizer.stops:
                    unfinished.remove(row)
        if not np.asarray(state.finite)[: len(prompts)].all():
            raise not_finite(self.name, self.adapter_name)
        return rows

    def _begin(self, prompts: jax.Array, mask: jax.Array, behind: Behind | None, room: int) -> State:
        return self._prefill(self.adapter, prompts, mask, behind, room)

    def _prefill(
        self, adapter: AppliedAdapter | None, prompts: jax.Array, mask: jax.Array, behind: Behind | None, room: int
    ) -> State:
        model = self.settings, self.params, adapter
        if behind is None:
            return prefill(*model, prompts, mask, room=room)
        return prefill_behind(*model, *behind, prompts, mask, room=room)

    @property
    def shares_beginnings(self) -> bool:
        """Whether prompts can be read behind a common beginning that was read once.

        A recurrent state would take up the padding between the two. A rotation that the length of a text switches would
        go by the longest prompt of a beginning.
        """
        return self.settings.mixer is None and all(rope.long_frequencies is None for rope in self.settings.ropes)

    def _extend(
        self, state: State, temperature: float, key: jax.Array, count: int
    ) -> tuple[State, jax.Array, jax.Array]:
        model, stops = (self.settings, self.params, self.adapter), self.tokenizer.stops
        numbers = jnp.float32(temperature), key, jnp.int32(count)
        return extend(*model, state, *numbers, count=rounded(count), stop_tokens=stops)

    def _end(self, tokens: np.ndarray, seen: int, until: Sequence[str]) -> int | None:
        """Count the tokens up to the one that completes a string of `until`; None where none behind `seen` does."""

        def complete(count: int) -> bool:
            # With special tokens, whose names may be among the strings.
            text = self.tokenizer.backend.decode(tokens[:count].tolist(), skip_special_tokens=False)
            return any(stop in text for stop in until)

        if not until or not complete(len(tokens)):
            return None
        return next(count for count in range(seen, len(tokens) + 1) if complete(count))

    def continue_texts(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        temperature: float,
        key: jax.Array,
        *,
        bar: Track | None = None,
    ) -> list[str]:
        """Continue texts as `write` does.

        Returns:
            What follows each text.

        Raises:
            AdapterError, CheckpointError: see `continue_tokens`.
        """
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
        """Answer prompts in batches of similar length, 48 or, of long prompts, fewer.

        What several of them begin with is read once, where the base allows it and that saves enough.

        Args:
            prompts: any number, texts or conversations; only the last 2,048 tokens of each are read.
            max_new_tokens: see `continue_tokens`.
            temperature: see `continue_tokens`.
            key: see `continue_tokens`.
            bar: a progress bar that advances by one for each prompt.

        Raises:
            AdapterError, CheckpointError: see `continue_tokens`.
            UsageError: the chat template refuses a conversation.
        """
        ids = [prompt_ids(self.tokenizer, prompt)[-LONGEST:] for prompt in prompts]
        found = [Written("", 0, False)] * len(ids)
        start = 0
        for batch in plan_batches(ids, max_new_tokens, share=self.shares_beginnings):
            model, sampling = self._for(batch.places, batch.shape[0]), (max_new_tokens, temperature, key)
            rows = model._continue(batch.texts, *sampling, batch.shape, True, beginnings=batch.beginnings)
            key = jax.random.fold_in(key, start)
            for place, row in zip(batch.places, rows, strict=True):
                found[place] = as_written(self.tokenizer, ids[place], row)
            start += len(batch.places)
            if bar is not None:
                bar.update(len(batch.places))
        return found

    def _for(self, places: Sequence[int], rows: int) -> Self:  # noqa: ARG002
        """Return what writes a batch of so many rows, the first of which are these of the prompts."""
        return self

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decode tokens without special tokens, and without a character that is cut off at the end."""
        return self.tokenizer.decode(tokens).rstrip(UNFINISHED)


@flax.struct.dataclass
class State:
    """A batch of B sequences between two tokens.

    Attributes:
        count: int32 (), tokens written so far.
        scores: float32 (B, V), logits of the next token.
        positions: int32 (B,), of the next token.
        cache: of all tokens before; a `KVCache`, or what another `run` of `write_tokens` takes for it.
        running: bool (B,), False behind a stop token.
        finite: bool (B,), False where a token was drawn from logits that are not numbers or infinite.
    """

    count: jax.Array
    scores: jax.Array
    positions: jax.Array
    cache: Any
    running: jax.Array
    finite: jax.Array


@partial(jax.jit, static_argnames=("settings", "room"))
def prefill(
    settings: DecoderSettings,
    params: Params,
    adapter: AppliedAdapter | None,
    prompts: jax.Array,
    mask: jax.Array,
    *,
    room: int,
) -> State:
    """Run prompts.

    Args:
        settings: of the model.
        params: its weights.
        adapter: or None.
        prompts: int32 (B, P).
        mask: bool (B, P), False at padding on either side; every row has at least one token.
        room: tokens that the cache has space for behind the prompts.
    """
    batch, length = prompts.shape
    cache = init_cache(settings, batch, length + room, params.cache_dtype)
    positions = positions_of(prompts, mask)
    return _begun(settings, params, mask, *extend_cache(settings, params, cache, prompts, positions, adapter))


@partial(jax.jit, static_argnames=("settings", "room"))
def prefill_behind(
    settings: DecoderSettings,
    params: Params,
    adapter: AppliedAdapter | None,
    beginnings: jax.Array,
    beginnings_mask: jax.Array,
    owners: jax.Array,
    prompts: jax.Array,
    mask: jax.Array,
    *,
    room: int,
) -> State:
    """Run prompts behind beginnings, each of which is read once.

    Args:
        settings: of the model, whose layers all have attention, and rotary settings that no length switches.
        params: its weights.
        adapter: or None; the same for all rows.
        beginnings: int32 (G, P).
        beginnings_mask: bool (G, P), False at padding on either side; every row has at least one token.
        owners: int32 (B,), the beginning in front of each prompt.
        prompts: int32 (B, T), without their beginnings.
        mask: bool (B, T), like the other.
        room: tokens that the cache has space for behind the prompts.

    Returns:
        What `prefill` does of the whole texts; its cache has padding between the two.
    """
    slots = beginnings.shape[1] + prompts.shape[1] + room
    cache = init_cache(settings, beginnings.shape[0], slots, params.cache_dtype)
    read = (beginnings, beginnings_mask), owners, (prompts, mask)
    return _begun(settings, params, mask, *extend_behind(settings, params, cache, *read, adapter))


def _begun(settings: DecoderSettings, params: Params, mask: jax.Array, hidden: jax.Array, cache: KVCache) -> State:
    """Return the state behind prompts, from their mask (B, T) and hidden states (B, T, H) and the cache with them."""
    batch, length = mask.shape
    last = jnp.argmax(jnp.where(mask, jnp.arange(length), -1), axis=-1)
    first = logits(settings, params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    running, finite = jnp.ones((batch,), bool), jnp.ones((batch,), bool)
    return State(jnp.zeros((), jnp.int32), first, jnp.max(cache.positions, axis=-1) + 1, cache, running, finite)


@partial(jax.jit, static_argnames=("settings", "count", "stop_tokens"), donate_argnames="state")
def extend(
    settings: DecoderSettings,
    params: Params,
    adapter: AppliedAdapter | None,
    state: State,
    temperature: jax.Array,
    key: jax.Array,
    most: jax.Array | None = None,
    *,
    count: int,
    stop_tokens: tuple[int, ...] = (),
) -> tuple[State, jax.Array, jax.Array]:
    """Write up to `most` tokens more; ends early when all sequences have stopped. The state is used up.

    It is compiled once for each `count`, which is at least `most`; None writes up to `count`.

    Returns:
        The new state; int32 (B, count) tokens, zeros behind a stop token; bool (B, count), True up to and including it.
    """

    def run(cache: KVCache, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, KVCache]:
        return step(settings, params, cache, tokens, positions, adapter)

    return write_tokens(run, state, temperature, key, most, count, stop_tokens)


def write_tokens(
    run: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]],
    state: State,
    temperature: jax.Array,
    key: jax.Array,
    most: jax.Array | None,
    count: int,
    stop_tokens: tuple[int, ...],
) -> tuple[State, jax.Array, jax.Array]:
    """Draw up to `most` tokens in a loop, as `extend` does.

    Args:
        run: of the cache in the state, tokens and their positions, int32 (B,) each: logits of the next, and the cache
            with these in it.
        state: to go on from.
        temperature: of the sampling.
        key: from `jax.random.key`.
        most: int32 (), the most tokens, at most `count`; None for `count`.
        count: columns of what is returned, static.
        stop_tokens: that end a text, static.
    """
    shape = len(state.scores), count

    def advance(carry: tuple[jax.Array, State, jax.Array, jax.Array]) -> tuple[jax.Array, State, jax.Array, jax.Array]:
        place, state, tokens, valid = carry
        drawn = draw(jax.random.fold_in(key, state.count), state.scores, temperature)
        drawn = jnp.where(state.running, drawn, 0)
        finite = state.finite & (jnp.isfinite(jnp.max(state.scores, axis=-1)) | ~state.running)
        scores, cache = run(state.cache, drawn, state.positions)
        running = state.running & ~jnp.isin(drawn, jnp.asarray(stop_tokens, jnp.int32))
        tokens, valid = tokens.at[:, place].set(drawn), valid.at[:, place].set(state.running)
        return place + 1, State(state.count + 1, scores, state.positions + 1, cache, running, finite), tokens, valid

    start = jnp.zeros((), jnp.int32), state, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
    _, state, tokens, valid = lax.while_loop(
        lambda carry: (carry[0] < (count if most is None else most)) & jnp.any(carry[1].running), advance, start
    )
    return state, tokens, valid


def step(
    settings: DecoderSettings,
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    adapter: AppliedAdapter | None = None,
) -> tuple[jax.Array, KVCache]:
    """Run one more token of every sequence.

    Args:
        settings: of the model.
        params: its weights.
        cache: of the tokens before; it must have a free slot, otherwise the last one is overwritten.
        tokens: int32 (B,).
        positions: int32 (B,), how many tokens, padding not counted, are before each.
        adapter: or None.

    Returns:
        float32 (B, V) logits of the token after these, and the cache with these in it.
    """
    place = positions[:, None]
    hidden, cache = extend_cache(settings, params, cache, tokens[:, None], (place, place), adapter)
    return logits(settings, params, hidden[:, 0]), cache
