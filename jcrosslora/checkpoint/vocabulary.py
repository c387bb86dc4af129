"""Convert tokens to bytes, so that vocabularies with different spellings of spaces can be compared.

Byte-level BPE (GPT-2, Llama 3, Qwen) writes each byte as one printable character; sentencepiece (Llama 2, Gemma,
Phi-3) writes a space as U+2581 and has tokens such as <0x0A> for single bytes. Two bases share the
tokens that stand for the same bytes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jcrosslora.checkpoint.store import read_json_object
from jcrosslora.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        tokens: bytes that a token stands for -> its id, without special and control tokens; None if unreadable.
        reason: why the vocabulary cannot be read, else "".
        special: name of a special or control token -> its id.
    """

    tokens: Mapping[bytes, int] | None
    reason: str = ""
    special: Mapping[bytes, int] = field(default_factory=dict)

    @property
    def names(self) -> dict[int, bytes]:
        """The token of each id, special and control tokens included."""
        return {index: name for name, index in {**(self.tokens or {}), **self.special}.items()}


def byte_alphabet() -> dict[str, int]:
    """Map each character of byte-level BPE to its byte.

    Printable Latin-1 characters are their own bytes; the characters from U+0100 on are the other bytes in order (GPT-2,
    `bytes_to_unicode` in https://github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


def decode_byte_level(token: str) -> bytes | None:
    """Decode a byte-level BPE token; None if a character is outside the alphabet."""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return None


def decode_sentencepiece(token: str) -> bytes:
    """Decode a sentencepiece token: U+2581 is a space, <0x0A> a single byte."""
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return decode_literal(token.replace(_SPACE, " "))


def decode_literal(token: str) -> bytes:
    """Encode a token that is matched literally in text."""
    return token.encode("utf-8", "surrogatepass")


def build_vocabulary(
    pairs: Iterable[tuple[bytes | None, int]], size: int, special: Iterable[tuple[bytes | None, int]] = ()
) -> Vocabulary:
    """Build a vocabulary from pairs (bytes, id); if two have the same bytes, the first is kept.

    Pairs without bytes, or with an id outside the embedding of `size` rows, are skipped.
    """
    tokens, others = ({}, {})
    for found, every in ((tokens, pairs), (others, special)):
        for token, index in every:
            if token and 0 <= index < size:
                found.setdefault(token, index)
    return Vocabulary(tokens, special=others) if tokens else Vocabulary(None, "the tokenizer lists no normal token")


def read_tokenizer(folder: Path | None, size: int) -> Vocabulary:
    """Read the vocabulary of `tokenizer.json` in a folder, for an embedding of `size` rows.

    If it cannot be read, the vocabulary has the reason. This is no error: a model is usable without it.
    """
    if folder is None:
        return Vocabulary(None, "no tokenizer was given")
    path = folder / "tokenizer.json"
    if not path.exists():
        return Vocabulary(None, f"{folder} has no tokenizer.json")
    try:
        tokenizer = read_json_object(path)
    except CheckpointError as error:
        return Vocabulary(None, str(error))
    try:
        return _from_tokenizer(tokenizer, size)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        return Vocabulary(None, f"{path} does not have the form of a tokenizer")


def _from_tokenizer(tokenizer: Mapping[str, Any], size: int) -> Vocabulary:
    model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
    kind, style = model.get("type"), _style(tokenizer)
    if kind not in ("BPE", "Unigram", None) or style is None:
        return Vocabulary(None, f"tokenizer model {kind!r} is neither byte-level nor sentencepiece style")
    entries = _entries(model["vocab"])
    added_ids = {int(token["id"]) for token in added}
    unknown = model.get("unk_token")
    if isinstance(index := model.get("unk_id"), int) and 0 <= index < len(entries):
        unknown = entries[index][0]
    bytewise = style == "byte-level"
    decode, decode_added = (decode_byte_level, decode_literal) if bytewise else (decode_sentencepiece,) * 2
    normal = [(t, i) for t, i in entries if i not in added_ids and t != unknown]
    # A byte token such as <0x41> comes last: text uses the token "A".
    normal.sort(key=lambda pair: not bytewise and _BYTE_TOKEN.fullmatch(pair[0]) is not None)
    literal = [(t["content"], int(t["id"])) for t in added if not t.get("special") and t["content"] != unknown]
    decoded = [(decode(token), index) for token, index in normal]
    special = [(decode_literal(t["content"]), int(t["id"])) for t in added if t.get("special")]
    return build_vocabulary(decoded + [(decode_added(t), i) for t, i in literal], size, special)


def _entries(vocab: Any) -> list[tuple[str, int]]:
    if isinstance(vocab, dict):
        return [(str(token), int(index)) for token, index in vocab.items()]
    return [(str(entry[0]), index) for index, entry in enumerate(vocab)]


def _style(tokenizer: Mapping[str, Any]) -> str | None:
    parts = [part for key in ("pre_tokenizer", "decoder", "normalizer") for part in _flatten(tokenizer.get(key))]
    if any(part.get("type") == "ByteLevel" for part in parts):
        return "byte-level"
    if tokenizer["model"].get("byte_fallback") or any(_writes_space(part) for part in parts):
        return "sentencepiece"
    return None


def _flatten(part: Any) -> list[Mapping[str, Any]]:
    if not part:
        return []
    inner = part.get("pretokenizers") or part.get("decoders") or part.get("normalizers")
    return [step for child in inner for step in _flatten(child)] if inner else [part]


def _writes_space(part: Mapping[str, Any]) -> bool:
    replaced = part.get("content"), (part.get("pattern") or {}).get("String")
    return part.get("type") == "Metaspace" or (part.get("type") == "Replace" and _SPACE in replaced)


# Types of tokens (`llama_token_type` of llama.cpp); 5 is an unused token.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_DECODERS = {"gpt2": decode_byte_level, "llama": decode_sentencepiece, "gemma4": decode_sentencepiece}


def gguf_vocabulary(metadata: Mapping[str, Any], size: int) -> Vocabulary:
    """Read the tokens of `tokenizer.ggml.*`, for an embedding of `size` rows; see `read_tokenizer`."""
    model = metadata.get("tokenizer.ggml.model")
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(model, str) or model not in _DECODERS:
        return Vocabulary(None, f"GGUF tokenizer model {model!r} is not supported ({', '.join(_DECODERS)} are)")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        return Vocabulary(None, "the GGUF metadata have no tokens with their types")
    if not all(isinstance(token, str) for token in tokens):
        return Vocabulary(None, "the GGUF metadata have tokens that are not strings")
    decoders = {NORMAL: _DECODERS[model], USER_DEFINED: decode_literal, BYTE: _DECODERS[model]}
    of_kind: dict[Any, list[tuple[bytes | None, int]]] = {kind: [] for kind in (*decoders, UNKNOWN, CONTROL)}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in of_kind:
            of_kind[kind].append((decoders.get(kind, decode_literal)(token), index))
    # Byte tokens last: text uses "A", not <0x41>.
    return build_vocabulary(chain(*(of_kind[kind] for kind in decoders)), size, of_kind[UNKNOWN] + of_kind[CONTROL])


# Correlations over fewer shared tokens than this are no better than guesses.
FEWEST_TOKENS = 32


class HasVocabulary(Protocol):
    """A base, or a source that can only be queried."""

    @property
    def ref(self) -> str:
        """What was opened, for messages."""
        ...

    def vocabulary(self) -> Vocabulary:
        """Return its tokens."""
        ...


def shared_ids(source: HasVocabulary, target: HasVocabulary) -> tuple[tuple[np.ndarray, np.ndarray] | None, str]:
    """Match the tokens of two bases that stand for the same bytes.

    Returns:
        The ids (V,) in source and target, sorted by the tokens' bytes, and ""; or None and the reason.
    """
    tokens = []
    for base in (source, target):
        vocabulary = base.vocabulary()
        if vocabulary.tokens is None:
            return None, f"{base.ref}: {vocabulary.reason}"
        tokens.append(vocabulary.tokens)
    shared = sorted(tokens[0].keys() & tokens[1].keys())
    if len(shared) < FEWEST_TOKENS:
        return None, f"the two vocabularies share {len(shared)} tokens, fewer than {FEWEST_TOKENS}"
    ids_src, ids_tgt = (np.array([one[token] for token in shared]) for one in tokens)
    return (ids_src, ids_tgt), ""
