"""Sources whose weights the decoder does not read: what has to be known of them, and their tokenizers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jcrosslora.checkpoint.hub import fetch_companions, is_hub_id
from jcrosslora.checkpoint.opening import read_template
from jcrosslora.checkpoint.store import read_json_object
from jcrosslora.checkpoint.tokenizer import Tokenizer, read_tokenizer
from jcrosslora.checkpoint.tokenizer_gguf import read_metadata
from jcrosslora.checkpoint.vocabulary import Vocabulary, gguf_vocabulary
from jcrosslora.checkpoint.vocabulary import read_tokenizer as read_vocabulary
from jcrosslora.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class ServedModel:
    """A base with an adapter that an OpenAI-compatible server runs: vLLM, SGLang, llama.cpp's or another.

    A key for the server is taken from the environment, JCROSSLORA_SOURCE_KEY or else OPENAI_API_KEY, and sent to this
    server alone.

    Attributes:
        url: such as http://host:8000/v1.
        model: the server's name of the base with the adapter.
        tokenizer: of the base: a folder with tokenizer.json, a GGUF file, or a hub id.
        base_model: the server's name of the base alone; None takes what the server says of the adapter: its parent
            (vLLM, SGLang), or the model with the adapter switched off (llama.cpp).
        chat_template: a file with the template that takes the place of the tokenizer's own.
        top_logprobs: how many of the likeliest tokens to ask for; servers allow 20 unless told otherwise.
        requests: the most requests at a time.
        timeout: seconds that a whole answer may take, however it trickles in.
    """

    url: str
    model: str
    tokenizer: str | Path
    base_model: str | None = None
    chat_template: str | Path | None = None
    top_logprobs: int = 20
    requests: int = 8
    timeout: float = 120.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: the address is none, or holds a password or a query; or a number is out of range.
        """
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            msg = f"source_url is {self.url[:200]!r}, wanted an address such as http://host:8000/v1"
            raise UsageError(msg)
        if parts.username or parts.password or parts.query or parts.fragment:
            msg = "source_url holds a name, a password or a query, which do not belong there: give a key by the "
            raise UsageError(msg + "environment variable JCROSSLORA_SOURCE_KEY or OPENAI_API_KEY")
        for name, fewest in (("top_logprobs", 1), ("requests", 1)):
            if getattr(self, name) < fewest:
                msg = f"source_{name} is {getattr(self, name)}, wanted {fewest} or more"
                raise UsageError(msg)
        if not self.timeout > 0:
            msg = f"the timeout of the source is {self.timeout}, wanted a positive number of seconds"
            raise UsageError(msg)


@dataclass(frozen=True)
class TorchModel:
    """A base that transformers runs.

    Attributes:
        ref: a folder, a GGUF file or a hub id.
        tokenizer: a folder, a file or a hub id; None is beside the weights.
        chat_template: a file with the template that takes the place of the tokenizer's own.
        device: such as "cpu" or "cuda:1"; None takes a GPU if torch has one.
    """

    ref: str | Path
    revision: str | None = None
    tokenizer: str | Path | None = None
    chat_template: str | Path | None = None
    device: str | None = None


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
