"""Checks of the model's settings, and the tokens that begin and end a text."""

from typing import Any, TypeGuard

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.errors import UsageError

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
