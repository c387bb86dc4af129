"""The tokenizer and the vocabulary of a source whose weights are not read: from a folder, a GGUF file or the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jcrosslora.checkpoint.gguf_metadata import gguf_vocabulary
from jcrosslora.checkpoint.hub import fetch_companions, is_hub_id
from jcrosslora.checkpoint.jsonfile import read_json_object
from jcrosslora.checkpoint.opening import read_template
from jcrosslora.checkpoint.tokenizer import Tokenizer, read_tokenizer
from jcrosslora.checkpoint.tokenizer_gguf import read_metadata
from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.checkpoint.vocabulary import read_tokenizer as read_vocabulary
from jcrosslora.errors import CheckpointError


def open_tokenizer(
    ref: str | Path, *, revision: str | None = None, chat_template: str | Path | None = None, vocab: int | None = None
) -> tuple[Tokenizer, Vocabulary]:
    """Open a tokenizer with its vocabulary.

    Args:
        ref: a folder with tokenizer.json, a tokenizer.json, a GGUF file, or a hub id.
        revision: of a hub id.
        chat_template: a file with the template that takes the place of the tokenizer's own.
        vocab: rows of the base's embedding; None takes as many as the tokenizer has tokens.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        UsageError: the template cannot be read.
    """
    path = _found(ref, revision)
    template = None if chat_template is None else read_template(Path(chat_template))
    tokenizer = read_tokenizer(path, str(ref), vocab, None if path.is_file() else _stated_ends(path), template)
    if path.is_file():
        return tokenizer, gguf_vocabulary(read_metadata(path), tokenizer.vocab)
    return tokenizer, read_vocabulary(path, tokenizer.vocab)


def with_own_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """Read conversations in another template, such as that beside an adapter, if there is one."""
    return tokenizer if template is None else replace(tokenizer, chat_template=template)


def _found(ref: str | Path, revision: str | None) -> Path:
    path = Path(ref).expanduser()
    if path.name == "tokenizer.json" and path.is_file():
        return path.parent
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if not path.exists() and isinstance(ref, str) and is_hub_id(ref):
        return fetch_companions(ref, revision)
    msg = f"{ref}: holds no tokenizer: give a folder with tokenizer.json, a .gguf file, or a hub id such as owner/name"
    raise CheckpointError(msg)


def _stated_ends(folder: Path) -> list[Any]:
    """List the tokens that end a text as the files beside a tokenizer state them."""
    found: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            stated = read_json_object(folder / name).get("eos_token_id")
            found += stated if isinstance(stated, list) else [stated]
    return found
