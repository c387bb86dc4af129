"""The tokens from which on an Activated LoRA acts, written in the tokens of another base."""

import dataclasses
from collections.abc import Sequence

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.errors import AdapterError


def with_invocation(adapter: Adapter, source: BaseModel, target: BaseModel) -> Adapter:
    """The adapter with its invocation in the tokens of the target, so that it can be moved there.

    Args:
        adapter: of the source; one that always acts, or that has its invocation for the target, is returned as it is.
        source: the base whose tokens `adapter.info.invocation` are.
        target: the base that it is to be moved to.

    Returns:
        The adapter with `info.invocation_target`.

    Raises:
        AdapterError: the text of the invocation does not survive in one of the tokenizers.
        CheckpointError: a base without a tokenizer that can be read.
    """
    tokens = adapter.info.invocation
    if tokens is None or adapter.info.invocation_target is not None:
        return adapter
    found = translated(tokens, load_tokenizer(source), load_tokenizer(target), adapter.info.name)
    return dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, invocation_target=found))


def translated(tokens: Sequence[int], source: Tokenizer, target: Tokenizer, name: str) -> tuple[int, ...]:
    """Tokens of one tokenizer as tokens of another, by way of their text.

    Args:
        tokens: of the source.
        source: its tokenizer.
        target: the other one.
        name: of the adapter, for messages.

    Raises:
        AdapterError: the text does not give the same tokens again, or not the same text.
    """
    if max(tokens) >= source.vocab:
        msg = f"{name}: its invocation has token {max(tokens)}, the base {source.ref} has {source.vocab} tokens"
        msg += ": give the base it was trained on"
        raise AdapterError(msg)
    text = _text(source, tokens)
    again = source.encode(text, special=False).ids.tolist()
    if again != list(tokens):
        msg = (
            f"{name}: its invocation {text!r} is {list(tokens)}, but the tokenizer of {source.ref} makes {again} of it"
        )
        msg += ": it would not be found in text"
        raise AdapterError(msg)
    found = target.encode(text, special=False).ids.tolist()
    if not found or _text(target, found) != text:
        msg = f"{name}: its invocation {text!r} becomes {_text(target, found)!r} in the tokens of {target.ref}"
        msg += ": the adapter could not be called there"
        raise AdapterError(msg)
    return tuple(found)


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """With special tokens, which invocations are often made of."""
    return tokenizer.backend.decode(list(tokens), skip_special_tokens=False)
