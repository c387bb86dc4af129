"""What the entries are found by: digests of everything that their content follows from, and of no name."""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import jax

from jcrosslora.cache.digests import FileDigests
from jcrosslora.checkpoint import BaseModel

# The number of the procedure that leads from weights to factors and transports, `linalg` and `methods` included: raise
# it with every change of the numbers that come out.
PROCEDURE = 4
# What a tokenizer is read from, beside the weights (see `load_tokenizer`); a GGUF file holds its own.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Of a configuration: they say where it came from, not what it is.
_PROVENANCE = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})


def digest_of(*parts: Any) -> str:
    """SHA-256 (hex) of JSON values; others, such as numpy's numbers, by their text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def sha256(*parts: bytes) -> str:
    """SHA-256 (hex) of byte strings, each with its length in front: no two lists of parts are the same bytes."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()


def tokenizer_parts(base: BaseModel) -> Iterator[bytes]:
    """Names and contents of the files that a base's tokenizer is read from, beside the weights."""
    if base.tokenizer_path is None:
        return
    for name in _TOKENIZER_FILES:
        path = base.tokenizer_path / name
        # One that is there but cannot be read is an error of whoever reads the tokenizer, who says so.
        with suppress(OSError):
            yield from (name.encode(), path.read_bytes())


def numerics_key() -> str:
    """Of what decides the last digits: the kind and number of devices, JAX's settings, versions, and the procedure.

    Processors of different makes are one kind to JAX: what one has left for another differs by rounding.
    """
    devices = jax.local_devices()
    # LAPACK comes from scipy, and on a CPU from numpy as well.
    versions = [importlib.metadata.version(name) for name in ("jcrosslora", "jax", "jaxlib", "numpy", "scipy")]
    settings = [jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision]  # type: ignore[attr-defined]
    kind = [jax.default_backend(), devices[0].device_kind, len(devices)]
    if jax.default_backend() != "cpu":
        # How many matrices a device works on at once; on a CPU it takes them one by one.
        kind.append(jax.process_count())
    return digest_of(PROCEDURE, versions, kind, settings)


def weights_key(base: BaseModel, digests: FileDigests | None = None) -> str:
    """Of a base's weights and how its modules are read from them.

    The weight files are read once if their digest is not remembered, by the base itself or by `digests`.
    """
    config = {name: value for name, value in base.config.items() if name not in _PROVENANCE}
    modules = [[name, module.shape, module.tensor, module.rows] for name, module in base.modules.items()]
    return digest_of(base.digest(digests), base.family.name, config, modules)


def tokenizer_key(base: BaseModel) -> str:
    """Of the files that a base's tokenizer is read from, beside the weights."""
    return sha256(*tokenizer_parts(base))
