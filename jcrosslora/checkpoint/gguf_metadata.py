"""The metadata of a GGUF file, read by key and checked by type."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.errors import CheckpointError

# general.architecture -> model_type. Mistral's exports say "llama": the modules are the same.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
_LARGEST = 1e38  # float32 ends at 3.4e38
_HUB_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+?)/?")


class Metadata:
    """The metadata of a GGUF file, with keys relative to its architecture.

    Args:
        values: all metadata.
        path: named in errors.

    Raises:
        CheckpointError: an architecture that is not supported, or a file that is no whole model.
    """

    def __init__(self, values: Mapping[str, Any], path: Path):
        self.values, self.path = values, path
        arch = values.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            msg = f"{path}: GGUF architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            raise CheckpointError(msg)
        self.arch = arch
        if values.get("general.type", "model") != "model":
            msg = f"{path}: is a GGUF of type {values['general.type']!r}, where a base model was wanted"
            raise CheckpointError(msg)
        if values.get("split.count", 1) not in (0, 1):
            msg = f"{path}: is one of {values['split.count']} parts: join them with llama-gguf-split --merge"
            raise CheckpointError(msg)
        if self.get("expert_count"):
            msg = f"{path}: mixture-of-experts models are not supported (expert_count {self.get('expert_count')})"
            raise CheckpointError(msg)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`."""
        return self.values.get(f"{self.arch}.{key}", default)

    def number(self, key: str) -> float | None:
        """A float value, as the shortest decimal that gives the stored float32 (1e-05, not 9.99999975e-06).

        Raises:
            CheckpointError: the value is not a positive number.
        """
        value = self.get(key)
        if value is None:
            return None
        # The bound keeps infinity and NaN out, too.
        if type(value) not in (int, float) or not 0 < value < _LARGEST:
            msg = f"{self.path}: {self.arch}.{key} is {str(value)[:60]!r}, wanted a positive number"
            raise CheckpointError(msg)
        return float(str(np.float32(value)))

    def count(self, key: str) -> int | None:
        """An integer value.

        Raises:
            CheckpointError: the value is not a non-negative integer of 32 bits.
        """
        value = self.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
            msg = f"{self.path}: {self.arch}.{key} is {str(value)[:60]!r}, wanted one non-negative integer"
            raise CheckpointError(msg)
        return value

    def head_dim(self) -> int:
        """Features of a head, 0 if the metadata do not tell."""
        return self.count("attention.key_length") or (self.count("embedding_length") or 0) // (
            self.count("attention.head_count") or 1
        )


def model_name(values: Mapping[str, Any]) -> str | None:
    """The hub id of the file's source repository if the metadata state one, else `general.name`."""
    for key in ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url"):
        if (hub_id := hub_id_of(values.get(key))) is not None:
            return hub_id
    name = values.get("general.name")
    return name if isinstance(name, str) and name else None


def hub_id_of(stated: Any) -> str | None:
    """The hub id in a value that is one, or the address of a repository on the hub; None for others."""
    if not isinstance(stated, str):
        return None
    if match := _HUB_URL.fullmatch(stated):
        return match[1]
    return stated if re.fullmatch(r"[\w.-]+/[\w.-]+", stated) else None
