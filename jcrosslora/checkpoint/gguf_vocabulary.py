"""The vocabulary in the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

from jcrosslora.checkpoint.gguf_metadata import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from jcrosslora.checkpoint.vocabulary import (
    Vocabulary,
    build_vocabulary,
    decode_byte_level,
    decode_literal,
    decode_sentencepiece,
)

_DECODERS = {"gpt2": decode_byte_level, "llama": decode_sentencepiece}


def gguf_vocabulary(metadata: Mapping[str, Any], size: int) -> Vocabulary:
    """Read the tokens of `tokenizer.ggml.*`.

    Args:
        metadata: the file's metadata.
        size: number of rows of the embedding.

    Returns:
        The vocabulary, or the reason why it cannot be read.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(model, str) or model not in _DECODERS:
        return Vocabulary(None, f"GGUF tokenizer model {model!r} is not supported (gpt2 and llama are)")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        return Vocabulary(None, "the GGUF metadata have no tokens with their types")
    if not all(isinstance(token, str) for token in tokens):
        return Vocabulary(None, "the GGUF metadata have tokens that are not strings")
    decode = _DECODERS[model]
    order = (NORMAL, USER_DEFINED, BYTE)  # byte tokens last: text uses "A", not <0x41>
    pairs = [
        (decode_literal(token) if kind == USER_DEFINED else decode(token), index, kind)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in order
    ]
    pairs.sort(key=lambda pair: order.index(pair[2]))
    special = (
        (decode_literal(token), index)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL)
    )
    return build_vocabulary(((token, index) for token, index, _ in pairs), size, special)
