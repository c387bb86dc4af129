"""Settings of lm-evaluation-harness: those of a task's generation, and checks of the model's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.errors import UsageError

# Spellings of one setting; the first one given counts, as in the harness.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READ = {"until", "do_sample", "temperature", *_LENGTHS}
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {"top_p": (1, None), "top_k": (0, None), "num_beams": (1, None)}


@dataclass(frozen=True)
class Options:
    """Settings of a generation.

    Attributes:
        until: strings; a text ends in front of the first one.
        length: the most tokens.
        temperature: of the sampling; 0 takes the likeliest token.
    """

    until: tuple[str, ...] = ()
    length: int = 256  # as in the harness's other models
    temperature: float = 0.0


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
        _refuse("temperature", value, "a number above 0 beside do_sample")
    return 0.0 if sampled is False else float(value)


def _refuse(name: str, came: Any, wanted: str) -> NoReturn:
    msg = f"generation setting {name} is {came!r}: wanted {wanted}"
    raise UsageError(msg)


_DTYPES = ("float32", "bfloat16")


def check_dtype(name: Any) -> str:
    """Check the name of a dtype.

    Raises:
        UsageError: the decoder does not run in it.
    """
    if name not in _DTYPES:
        msg = f"dtype {name!r} was asked for, wanted {' or '.join(_DTYPES)}"
        raise UsageError(msg)
    return name


def positive(name: str, value: Any, *, least: int = 1) -> int:
    """Check a whole number.

    Raises:
        UsageError: it is not a whole number, or below `least`.
    """
    if type(value) is not int or value < least:
        msg = f"{name} is {value!r}: wanted a whole number from {least} on"
        raise UsageError(msg)
    return value


def prefix_token(base: BaseModel, tokenizer: Tokenizer, given: int | None) -> int:
    """Choose the token in front of a text without context: bos, even if the tokenizer does not put it there; or eos.

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
    """Choose the token that ends a text: eos of the configuration, else the first stop token.

    Raises:
        UsageError: there is none.
    """
    stated = base.config.get("eos_token_id")
    for index in [*(stated if isinstance(stated, list) else [stated]), *tokenizer.stops]:
        if _is_token(index, base):
            return index
    msg = f"{base.ref}: neither its configuration nor its tokenizer names bos or eos: give prefix_token_id"
    raise UsageError(msg)


def _is_token(index: Any, base: BaseModel) -> TypeGuard[int]:
    return type(index) is int and 0 <= index < base.dims.vocab
