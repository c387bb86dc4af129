"""Probe texts with their provenance, and their disk cache.

A cached text is keyed by everything that it depends on; without a writable folder the cache is off.

The folder is `probes` in the user's cache, see `jcrosslora.cache.place.cache_root`. It may be removed at any time.
Processes may share it: files are written atomically, and a damaged file counts as missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.cache.keys import sha256, tokenizer_parts
from jcrosslora.cache.place import cache_root
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import fast_dtype
from jcrosslora.evaluate.probes.writing import write_texts
from jcrosslora.text import Prompt
from jcrosslora.text.completion import prompt_text
from jcrosslora.utils.files import write_whole

COUNT, LENGTH = 288, 96


@dataclass(frozen=True)
class Probes:
    """Texts that both bases are run on.

    Attributes:
        texts: at least one.
        description: their origin, for reports, e.g. "written by HuggingFaceTB/SmolLM2-135M at temperature 1".
        seed: seed of generated or sampled texts; None for given texts.
        positions: number of matched positions of the two bases (see `count_positions`); None before it is known.
        path: file that given texts were read from; None for other texts.
        prompts: what given texts were made of, which may be conversations; empty for other texts.
    """

    texts: tuple[str, ...]
    description: str
    seed: int | None = None
    positions: int | None = None
    path: str | None = None
    prompts: tuple[Prompt, ...] = ()

    @classmethod
    def given(cls, prompts: Sequence[Prompt], description: str, path: str | None = None) -> Probes:
        """Make the record of texts or conversations that a user gave."""
        texts = tuple(prompt_text(prompt) for prompt in prompts)
        return cls(texts, description, path=path, prompts=tuple(prompts))

    def describe(self) -> str:
        """Describe the texts in a line for reports: count, source, seed, matched positions and digest."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        positions = "" if self.positions is None else f", {self.positions} matched positions"
        return f"{len(self.texts)} texts {self.description}{seed}{positions}, sha256 {self.digest()[:12]}"

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the texts as UTF-8, with a zero byte behind each."""
        joined = "".join(f"{text}\0" for text in self.texts)
        return hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()


def written_probes(
    base: BaseModel,
    count: int = COUNT,
    *,
    length: int = LENGTH,
    temperature: float = 1.0,
    seed: int = 0,
    adapter: Adapter | None = None,
) -> Probes:
    """Let a base write probe texts; arguments and errors are those of `write_texts`.

    Texts of the same base, adapter and settings are read from the disk cache (see `jcrosslora.evaluate.probes.record`;
    the environment variable JCROSSLORA_CACHE moves the folder).
    """
    key = texts_key(base, count, length, temperature, seed, adapter)
    texts = find_texts(key)
    if texts is None:
        texts = write_texts(base, count, length=length, temperature=temperature, seed=seed, adapter=adapter)
        keep_texts(key, texts)
    writer = base.name if adapter is None else f"{base.name} with an adapter"
    return Probes(tuple(texts), f"written by {writer} at temperature {temperature:g}", seed)


# Version of the procedure in `writing` and `start_words`: raise it whenever its texts change.
PROCEDURE = 1
TEXTS = "probes"  # the folder, below the cache's root


def texts_key(base: BaseModel, count: int, length: int, temperature: float, seed: int, adapter: Adapter | None) -> str:
    """Hash everything that the texts of `write_texts` depend on (SHA-256, hex); reads the weight files once.

    These are the base's weights, configuration and tokenizer, the adapter's factors, the settings, the version of the
    procedure, JAX's platform and its fast dtype: sampling repeats exactly on one kind of machine only.
    """
    settings = [count, length, float(temperature), seed]
    # `default` handles numpy scalars and any other values in a configuration.
    parts = [PROCEDURE, jax.default_backend(), fast_dtype().name, base.digest(), dict(base.config), settings]
    stated = json.dumps(parts, sort_keys=True, default=str)
    return sha256(stated.encode(), *tokenizer_parts(base), *_adapter_parts(adapter))


def find_texts(key: str) -> list[str] | None:
    """Return the texts of a key, or None if the file is missing, unreadable or damaged."""
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
    """Store texts under a key; do nothing if the folder is not writable or the disk is full."""
    path = _path(key)
    if path is None:
        return
    content = json.dumps({"key": key, "sha256": _checksum(texts), "texts": texts}, indent=0)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode())


def _path(key: str) -> Path | None:
    """Return the file of a key; None for a user without a home folder."""
    root = cache_root()
    return None if root is None else root / TEXTS / f"{key}.json"


def _checksum(texts: object) -> str:
    return sha256(json.dumps(texts).encode())


def _adapter_parts(adapter: Adapter | None) -> Iterator[bytes]:
    if adapter is None:
        return
    for name, factors in sorted(adapter.modules.items()):
        yield f"{name} {factors.scale!r}".encode()
        for side in (factors.a, factors.b):
            array = np.asarray(side)
            yield f"{array.dtype} {array.shape}".encode()
            yield array.tobytes()
