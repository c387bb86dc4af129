"""Generation settings of a task of lm-evaluation-harness."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

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
