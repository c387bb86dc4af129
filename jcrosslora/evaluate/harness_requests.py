"""Answer the requests of lm-evaluation-harness: read their settings, score continuations, and generate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

import jax
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder import Generator
from jcrosslora.errors import UsageError, not_finite
from jcrosslora.evaluate.log_probs import Models, scored_tokens
from jcrosslora.evaluate.packing import Tokens
from jcrosslora.evaluate.probes import check_seed
from jcrosslora.utils.progress import track
from jcrosslora.utils.settings import Settings

Pair = tuple[Sequence[int], Sequence[int]]
_NARROWEST = 8  # tokens of a prompt's row
# Spellings of one setting; the first one given counts, as in the harness.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READ = {"until", "do_sample", "temperature", *_LENGTHS}
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {"top_p": (1, None), "top_k": (0, None), "num_beams": (1, None)}
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class ModelSettings(Settings):
    """How a base is run for the harness.

    Attributes:
        dtype: of the weights, float32 or bfloat16.
        batch_tokens: token positions in memory at once.
        max_length: the most tokens that the model reads; None takes the number in its configuration.
        prefix_token_id: token before a text without context; None takes bos, or eos if there is no bos.
        seed: of the sampling, in tasks with a temperature.
        bars: whether to show progress as the harness asks; else as `jcrosslora.show_progress` says.
        batch_size: accepted for the harness and not used, as the next two: see `batch_tokens`; JAX picks the device.

    Raises:
        UsageError: dtype, batch_tokens or seed out of range.
    """

    dtype: str = "float32"
    batch_tokens: int = 4096
    max_length: int | None = None
    prefix_token_id: int | None = None
    seed: int = 0
    bars: bool = True
    batch_size: int | str | None = None
    max_batch_size: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise UsageError(f"dtype {self.dtype!r} was asked for, wanted {' or '.join(_DTYPES)}")
        positive("batch_tokens", self.batch_tokens)
        check_seed(positive("seed", self.seed, least=0))


@dataclass(frozen=True)
class Options:
    """Settings of a generation."""

    until: tuple[str, ...] = ()  # the text ends before the first of these
    length: int = 256  # tokens at most, as in the harness's other models
    temperature: float = 0.0  # 0 takes the likeliest token


def read_options(given: Mapping[str, Any]) -> Options:
    """Read the `generation_kwargs` of a task.

    Raises:
        UsageError: a value out of range, or a setting that is not supported and would change the text.
    """
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(text, str) for text in until):
        _refuse("until", until, "a text or a list of texts")
    temperature = _temperature(given)
    for name in given.keys() - _READ:
        greedy = temperature == 0 and name in ("top_p", "top_k")  # neither takes the likeliest token away
        if not greedy and given[name] not in _WITHOUT_EFFECT.get(name, ()):
            _refuse(name, given[name], f"only {', '.join(sorted(_READ))}: it is not supported")
    return Options(tuple(filter(None, until)), _length(given), temperature)


def judge(models: Models, pairs: Sequence[Pair], batch_tokens: int) -> list[tuple[float, bool]]:
    """Score the continuation of each pair; a context that several pairs share is run once.

    Pairs are token ids of a context and its continuation, neither empty.

    Returns:
        The log-probability of each continuation, in nats, and whether each of its tokens is the likeliest one.
    """
    groups = _grouped(pairs, batch_tokens)
    sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    with track(len(groups), "score", "contexts") as bar:
        for found in scored_tokens(models, [_tokens(pairs, group) for group in groups], batch_tokens, bar):
            owners = np.array([groups[item][choice] for item, choice in found.places])
            np.add.at(sums, owners, found.log_probs[0].astype(np.float64))
            np.logical_and.at(greedy, owners, found.likeliest[0] == found.wanted)
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def check_finite(found: Sequence[tuple[float, bool]], base: BaseModel, adapter: Adapter | None) -> None:
    """Raise if a value is not finite: CheckpointError of the base alone, AdapterError with an adapter."""
    if not all(math.isfinite(value) for value, _ in found):
        raise not_finite(base.name, None if adapter is None else adapter.info.name, values="log-probabilities")


def _grouped(pairs: Sequence[Pair], batch_tokens: int) -> list[list[int]]:
    """Group the indices of pairs with the same context, so that no group is larger than a batch."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(index)
    groups = []
    for context, found in by_context.items():
        # Each continuation has a copy of the context's keys and values.
        size = max(1, batch_tokens // (len(context) + max(len(pairs[index][1]) for index in found)))
        groups += [found[start : start + size] for start in range(0, len(found), size)]
    return groups


def _tokens(pairs: Sequence[Pair], group: list[int]) -> Tokens:
    context = np.array(pairs[group[0]][0], np.int32)
    tails = tuple(np.concatenate([context[-1:], np.array(pairs[index][1], np.int32)]) for index in group)
    return Tokens(context[:-1], tails, (1,) * len(group))


def generate(generator: Generator, prompts: Sequence[Sequence[int]], options: Options, key: jax.Array) -> list[str]:
    """Continue prompts in one batch, which ends soon after its last stop string.

    Returns:
        The texts, without stop strings and special tokens.

    Raises:
        AdapterError, CheckpointError: see `Generator.continue_tokens`.
    """
    # Powers of two, since every further shape has to be compiled.
    shape = _rounded(len(prompts)), max(_NARROWEST, _rounded(max(map(len, prompts))))
    rows = generator.continue_tokens(
        prompts, options.length, options.temperature, key, shape=shape, until=options.until
    )
    return [_until(generator.tokenizer.decode(row), options.until) for row in rows]


def group_prompts(prompts: Sequence[tuple[list[int], Options]], batch_tokens: int) -> list[tuple[Options, list[int]]]:
    """Group the indices of prompts that are continued together: those with the same options, the longest first.

    A batch has at most `batch_tokens` token positions, or a single prompt.
    """
    by_options: dict[Options, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index][0])):
        by_options.setdefault(prompts[index][1], []).append(index)
    groups = []
    for options, members in by_options.items():
        while members:
            count = max(1, batch_tokens // (len(prompts[members[0]][0]) + options.length))
            groups.append((options, members[:count]))
            members = members[count:]
    return groups


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _rounded(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _length(given: Mapping[str, Any]) -> int:
    name, value = next(
        ((name, given[name]) for name in _LENGTHS if given.get(name) is not None), (_LENGTHS[0], Options().length)
    )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(name, value, "a whole number from 1 on")
    return value


def _temperature(given: Mapping[str, Any]) -> float:
    sampled, value = given.get("do_sample"), given.get("temperature")
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        _refuse("temperature", value, "a finite number from 0 on")
    if sampled is not None and not isinstance(sampled, bool):
        _refuse("do_sample", sampled, "true or false")
    if sampled and value == 0:
        _refuse("temperature", value, "a number above 0 with do_sample")
    return 0.0 if sampled is False else float(value)


def _refuse(name: str, came: Any, wanted: str) -> NoReturn:
    raise UsageError(f"generation setting {name} is {came!r}: wanted {wanted}")


def positive(name: str, value: Any, *, least: int = 1) -> int:
    """Check a whole number.

    Raises:
        UsageError: it is not a whole number, or below `least`.
    """
    if type(value) is not int or value < least:
        raise UsageError(f"{name} is {value!r}: wanted a whole number from {least} on")
    return value


def prefix_token(base: BaseModel, tokenizer: Tokenizer, given: int | None) -> int:
    """Choose the token before a text without context: bos, even if the tokenizer does not put it there; or eos.

    Raises:
        UsageError: there is none, or the one given is not in the vocabulary.
    """
    if given is not None:
        if positive("prefix_token_id", given, least=0) >= base.dims.vocab:
            msg = f"prefix_token_id {given} is not in the vocabulary of {base.ref}: wanted 0 to {base.dims.vocab - 1}"
            raise UsageError(msg)
        return given
    for index in (tokenizer.bos, base.config.get("bos_token_id")):
        if _is_token(index, base):
            return index
    return end_token(base, tokenizer)


def end_token(base: BaseModel, tokenizer: Tokenizer) -> int:
    """Choose the token that ends a text: eos of the configuration, else the first stop token."""
    stated = base.config.get("eos_token_id")
    for index in [*(stated if isinstance(stated, list) else [stated]), *tokenizer.stops]:
        if _is_token(index, base):
            return index
    raise UsageError(f"{base.ref}: neither its configuration nor its tokenizer names bos or eos: give prefix_token_id")


def _is_token(index: Any, base: BaseModel) -> TypeGuard[int]:
    return type(index) is int and 0 <= index < base.dims.vocab
