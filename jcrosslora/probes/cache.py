"""Written texts on disk, found again by all that they were made from; without a place to write, nothing is kept.

The folder is `probes` in $JCROSSLORA_CACHE, else in `jcrosslora` in $XDG_CACHE_HOME, else in ~/.cache/jcrosslora. It
may be removed at any time. Processes may share it: a file appears whole, and one that is damaged counts as missing.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel

# The number of the procedure in `writing` and `start_words`: raise it with every change of what it writes.
PROCEDURE = 1
# What a tokenizer is read from, beside the weights (see `load_tokenizer`); a GGUF file holds its own.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def texts_key(base: BaseModel, count: int, length: int, temperature: float, seed: int, adapter: Adapter | None) -> str:
    """SHA-256 (hex) over all that decides what `write_texts` writes; reads the weight files once for their digest.

    That is the base's weights, configuration and tokenizer, the adapter's numbers, the settings, the procedure, and
    JAX's platform, since the sampling is the same on one kind of machine only.
    """
    settings = [count, length, float(temperature), seed]
    # `default`: numpy's numbers, as integer settings, and whatever a foreign configuration holds.
    parts = [PROCEDURE, jax.default_backend(), base.digest(), dict(base.config), settings]
    stated = json.dumps(parts, sort_keys=True, default=str)
    return _sha256(stated.encode(), *_tokenizer_parts(base), *_adapter_parts(adapter))


def find_texts(key: str) -> list[str] | None:
    """The texts kept under a key; None if there are none, or their file cannot be read or is damaged."""
    path = _path(key)
    if path is None:
        return None
    try:
        record = json.loads(path.read_bytes())
        texts = record["texts"]
        whole = record["key"] == key and record["sha256"] == _checksum(texts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return texts if whole else None


def keep_texts(key: str, texts: list[str]) -> None:
    """Keep texts under a key. Where the folder cannot be written to, or the disk is full, nothing happens."""
    path = _path(key)
    if path is None:
        return
    content = json.dumps({"key": key, "sha256": _checksum(texts), "texts": texts}, indent=0)
    work = path.with_name(f".{key}.{secrets.token_hex(8)}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            work.write_text(content, encoding="ascii")
            work.replace(path)
        finally:
            work.unlink(missing_ok=True)


def _path(key: str) -> Path | None:
    if own := os.environ.get("JCROSSLORA_CACHE"):
        return Path(own) / "probes" / f"{key}.json"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return None
    return folder / "jcrosslora" / "probes" / f"{key}.json"


def _checksum(texts: object) -> str:
    return _sha256(json.dumps(texts).encode())


def _sha256(*parts: bytes) -> str:
    # Each part with its length in front: no two lists of parts are the same bytes.
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()


def _tokenizer_parts(base: BaseModel) -> Iterator[bytes]:
    for name in _TOKENIZER_FILES:
        path = base.path / name
        # One that is there but cannot be read is an error of `load_tokenizer`, which says so.
        with suppress(OSError):
            yield from (name.encode(), path.read_bytes())


def _adapter_parts(adapter: Adapter | None) -> Iterator[bytes]:
    if adapter is None:
        return
    for name, factors in sorted(adapter.modules.items()):
        yield f"{name} {factors.scale!r}".encode()
        for side in (factors.a, factors.b):
            array = np.asarray(side)
            yield f"{array.dtype} {array.shape}".encode()
            yield array.tobytes()
