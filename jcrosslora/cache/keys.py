"""Compute the keys of entries: digests of everything that their content depends on, never of names."""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import jax

from jcrosslora.cache.digests import FileDigests
from jcrosslora.checkpoint import BaseModel

# Version of the computations whose results are cached; raise it with every change of the resulting numbers.
_PROCEDURE = 4
# Files of a tokenizer beside the weights (see `load_tokenizer`); a GGUF file contains its own.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Keys of a configuration that say where it came from.
_PROVENANCE = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})


def digest_of(*parts: Any) -> str:
    """Return the SHA-256 (hex) of JSON values; other values, such as numpy's numbers, count by their text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def sha256(*parts: bytes) -> str:
    """Return the SHA-256 (hex) of byte strings, each preceded by its length, so that no two lists collide."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()


def tokenizer_parts(base: BaseModel) -> Iterator[bytes]:
    """Yield names and contents of the files of a base's tokenizer beside the weights."""
    if base.tokenizer_path is None:
        return
    for name in _TOKENIZER_FILES:
        path = base.tokenizer_path / name
        # One that is there but cannot be read is an error of whoever reads the tokenizer, who says so.
        with suppress(OSError):
            yield from (name.encode(), path.read_bytes())


def numerics_key() -> str:
    """Return the key of everything that decides the last digits: devices, settings of JAX, versions, and procedure.

    JAX does not distinguish makes of processors, so a result that another processor cached may differ by rounding.
    """
    devices = jax.local_devices()
    # LAPACK comes from scipy, and on a CPU from numpy as well.
    versions = [importlib.metadata.version(name) for name in ("jcrosslora", "jax", "jaxlib", "numpy", "scipy")]
    settings = [jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision]  # type: ignore[attr-defined]
    kind = [jax.default_backend(), devices[0].device_kind, len(devices)]
    if jax.default_backend() != "cpu":
        # Decides how many matrices a device works on at once; a CPU takes them one by one.
        kind.append(jax.process_count())
    return digest_of(_PROCEDURE, versions, kind, settings)


def weights_key(base: BaseModel, digests: FileDigests | None = None) -> str:
    """Return the key of a base's weights and of how its modules are read from them.

    Reads the weight files once unless the base or `digests` remembers their digest.
    """
    config = {name: value for name, value in base.config.items() if name not in _PROVENANCE}
    modules = [[name, module.shape, module.tensor, module.rows] for name, module in base.modules.items()]
    return digest_of(base.digest(digests), base.family.name, config, modules)


def tokenizer_key(base: BaseModel) -> str:
    """Return the key of the files of a base's tokenizer beside the weights."""
    return sha256(*tokenizer_parts(base))
