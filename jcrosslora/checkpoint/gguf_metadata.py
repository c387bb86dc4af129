"""The metadata of a GGUF file, by key, with checked types; the vocabulary is part of it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.architectures.families import FAMILIES
from jcrosslora.checkpoint.vocabulary import (
    Vocabulary,
    build_vocabulary,
    decode_byte_level,
    decode_literal,
    decode_sentencepiece,
)
from jcrosslora.errors import CheckpointError

# general.architecture -> model_type. Of families with one architecture, which have the same modules, it is the first:
# "llama" for Mistral too, and "olmo2" for OLMo 3.
ARCHITECTURES: dict[str, str] = {}
for _family in FAMILIES.values():
    for _architecture in () if _family.gguf is None else _family.gguf.architectures:
        ARCHITECTURES.setdefault(_architecture, _family.name)
_WITH_EXPERTS = {
    one.gguf.architectures[-1] for one in FAMILIES.values() if one.gguf is not None and one.experts is not None
}
# Architectures of families that are read from safetensors alone -> why.
_REFUSED = {
    "falcon-h1": "its files hold the factors of the configuration in the weights, and do not state them",
    "phimoe": "llama.cpp weighs the experts otherwise than the class of the model",
    "chatglm": "its files do not state the epsilon of the norms",
}
# Types of tokens (`llama_token_type` of llama.cpp); 5 is an unused token.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_LARGEST = 1e38  # float32 ends at 3.4e38
_HUB_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+?)/?")


class Metadata:
    """The metadata of a GGUF file, with keys relative to its architecture.

    Args:
        values: all metadata.
        path: the file, for errors.

    Raises:
        CheckpointError: an architecture that is not supported, or a file that is not a complete base model.
    """

    def __init__(self, values: Mapping[str, Any], path: Path):
        self.values, self.path = values, path
        arch = values.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            why = (
                f": {_REFUSED[arch]}: use the safetensors of the model"
                if isinstance(arch, str) and arch in _REFUSED
                else ""
            )
            msg = f"{path}: GGUF architecture {arch!r} is not supported{why}; supported: {', '.join(ARCHITECTURES)}"
            raise CheckpointError(msg)
        self.arch = arch
        if values.get("general.type", "model") != "model":
            msg = f"{path}: is a GGUF of type {values['general.type']!r}, where a base model was wanted"
            raise CheckpointError(msg)
        if values.get("split.count", 1) not in (0, 1):
            msg = f"{path}: is one of {values['split.count']} parts: join them with llama-gguf-split --merge"
            raise CheckpointError(msg)
        if self.get("expert_count") and arch not in _WITH_EXPERTS:
            msg = (
                f"{path}: experts are not supported for architecture {arch!r} (expert_count {self.get('expert_count')})"
            )
            raise CheckpointError(msg)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `<architecture>.<key>`."""
        return self.values.get(f"{self.arch}.{key}", default)

    def number(self, key: str) -> float | None:
        """Return a positive number, as the shortest decimal of the stored float32 (1e-05, not 9.99999975e-06).

        Raises:
            CheckpointError: the value is not a positive number.
        """
        value = self.get(key)
        if value is None:
            return None
        # The bound also excludes infinity and NaN.
        if type(value) not in (int, float) or not 0 < value < _LARGEST:
            msg = f"{self.path}: {self.arch}.{key} is {str(value)[:60]!r}, wanted a positive number"
            raise CheckpointError(msg)
        return float(str(np.float32(value)))

    def count(self, key: str) -> int | None:
        """Return a non-negative integer.

        Raises:
            CheckpointError: the value is not a non-negative integer of 32 bits.
        """
        value = self.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
            msg = f"{self.path}: {self.arch}.{key} is {str(value)[:60]!r}, wanted one non-negative integer"
            raise CheckpointError(msg)
        return value

    def most(self, key: str) -> int | None:
        """Return a non-negative integer, or the largest of a list with one for each layer.

        Raises:
            CheckpointError: the value is neither.
        """
        value = self.get(key)
        if not isinstance(value, list):
            return self.count(key)
        if not value or not all(type(one) is int and 0 <= one < 1 << 31 for one in value):
            msg = f"{self.path}: {self.arch}.{key} is {str(value)[:60]}, wanted an integer for each layer"
            raise CheckpointError(msg)
        return max(value)

    def layers(self) -> int | None:
        """Return the number of layers, without those behind the last that predict further tokens."""
        blocks, further = self.count("block_count"), self.count("nextn_predict_layers") or 0
        return blocks if blocks is None else max(blocks - further, 0)

    def own(self) -> dict[str, Any]:
        """Return the values of the architecture, by their keys without it."""
        first = f"{self.arch}."
        return {key.removeprefix(first): value for key, value in self.values.items() if key.startswith(first)}

    def head_dim(self) -> int:
        """Return the features of a head, 0 if the metadata do not state them."""
        return self.count("attention.key_length") or (self.count("embedding_length") or 0) // (
            self.count("attention.head_count") or 1
        )


def model_name(values: Mapping[str, Any]) -> str | None:
    """Return the hub id of the source repository if the metadata state one, else `general.name`."""
    for key in ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url"):
        if (hub_id := hub_id_of(values.get(key))) is not None:
            return hub_id
    name = values.get("general.name")
    return name if isinstance(name, str) and name else None


def hub_id_of(stated: Any) -> str | None:
    """Return the hub id in a value that is a hub id or the address of a repository on the hub, else None."""
    if not isinstance(stated, str):
        return None
    if match := _HUB_URL.fullmatch(stated):
        return match[1]
    return stated if re.fullmatch(r"[\w.-]+/[\w.-]+", stated) else None


_DECODERS = {"gpt2": decode_byte_level, "llama": decode_sentencepiece, "gemma4": decode_sentencepiece}


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
        return Vocabulary(None, f"GGUF tokenizer model {model!r} is not supported ({', '.join(_DECODERS)} are)")
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
