"""Translate the invocation tokens of an Activated LoRA into the tokens of another base."""

import dataclasses
from collections.abc import Sequence

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.errors import AdapterError


def with_invocation(adapter: Adapter, source: BaseModel, target: BaseModel) -> Adapter:
    """Return the adapter with its invocation in the tokens of the target.

    Args:
        adapter: an adapter of the source. Without an invocation, or with one for the target, it is returned unchanged.
        source: the base whose tokens `adapter.info.invocation` holds.
        target: the base that it moves to.

    Returns:
        The adapter with `info.invocation_target`.

    Raises:
        AdapterError: one of the tokenizers does not reproduce the text of the invocation.
        CheckpointError: the tokenizer of a base cannot be read.
    """
    tokens = adapter.info.invocation
    if tokens is None or adapter.info.invocation_target is not None:
        return adapter
    found = translate(tokens, load_tokenizer(source), load_tokenizer(target), adapter.info.name)
    return dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, invocation_target=found))


def translate(tokens: Sequence[int], source: Tokenizer, target: Tokenizer, name: str) -> tuple[int, ...]:
    """Translate tokens of one tokenizer into tokens of another through their text.

    Args:
        tokens: tokens of the source.
        source: the tokenizer of the source.
        target: the tokenizer of the target.
        name: name of the adapter, for errors.

    Raises:
        AdapterError: the source does not encode the text to the same tokens, or the target not to the same text.
    """
    if max(tokens) >= source.vocab:
        msg = f"{name}: its invocation has token {max(tokens)}, but the base {source.ref} has {source.vocab} tokens"
        raise AdapterError(msg + ": give the base it was trained on")
    text = _text(source, tokens)
    again = source.encode(text, special=False).ids.tolist()
    if again != list(tokens):
        msg = f"{name}: its invocation {text!r} is {list(tokens)}, but {source.ref} encodes it as {again}"
        raise AdapterError(msg + ": it would not be found in text")
    found = target.encode(text, special=False).ids.tolist()
    if not found or _text(target, found) != text:
        msg = f"{name}: its invocation {text!r} becomes {_text(target, found)!r} in the tokens of {target.ref}"
        raise AdapterError(msg + ": the adapter could not be called there")
    return tuple(found)


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Decode tokens with special tokens, which invocations often consist of."""
    return tokenizer.backend.decode(list(tokens), skip_special_tokens=False)
