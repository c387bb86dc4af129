"""The format of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter.contents import Contents
from jcrosslora.adapter.folder import CONFIG, WEIGHTS
from jcrosslora.adapter.names import PREFIX, ending
from jcrosslora.adapter.patterns import exact_pattern
from jcrosslora.adapter.portable import file_factors
from jcrosslora.adapter.serialized import serialized
from jcrosslora.adapter.write_tokens import token_config, token_ranks, token_tensors


def write_portable(contents: Contents, folder: Path) -> None:
    """One rank, lower ones padded with zeros, and lora_alpha == r: the form that every engine reads the same way."""
    _write(dataclasses.replace(contents, tokens=()), folder, contents.rank)


def write_peft(contents: Contents, folder: Path) -> None:
    """Each module's own rank, in `rank_pattern` and `alpha_pattern`, which PEFT and new releases of vLLM read.

    The magnitudes of a DoRA stay in float32: what they change is their small difference from the norms of the rows.
    With changes of the embedding and the head, which PEFT alone is sure to read.
    """
    _write(contents, folder, None)


def _write(contents: Contents, folder: Path, rank: int | None) -> None:
    tensors: dict[str, np.ndarray] = {}
    for name, factors in contents.modules.items():
        a, b = file_factors(name, factors, contents.dtype, rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a, b
        if contents.magnitudes is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = np.ascontiguousarray(contents.magnitudes[name])
    tensors |= token_tensors(contents.tokens, contents.dtype)
    ranks = {name: rank or factors.rank for name, factors in contents.modules.items()}
    config = peft_config(
        ranks | token_ranks(contents.tokens),
        base_name=contents.base_name,
        base_revision=contents.base_revision,
        exclude=contents.exclude,
        invocation=contents.invocation,
        dora=contents.magnitudes is not None,
    )
    config |= token_config(contents.tokens)
    write_files(folder, tensors, config, contents.metadata)


def write_files(
    folder: Path, tensors: dict[str, np.ndarray], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write the two files of PEFT.

    Args:
        folder: to write into.
        tensors: C-contiguous arrays by their names in the file.
        config: `adapter_config.json`.
        metadata: pairs of strings for the header.
    """
    # As bytes, because safetensors' own writer hides the system's error (disk full) in one of its own.
    (folder / WEIGHTS).write_bytes(serialized(tensors, {**metadata, "format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def peft_config(
    ranks: Mapping[str, int],
    *,
    base_name: str | None = None,
    base_revision: str | None = None,
    exclude: Sequence[str] = (),
    invocation: Sequence[int] | None = None,
    dora: bool = False,
) -> dict[str, Any]:
    """The `adapter_config.json` for modules of these ranks, all with scale 1.

    Keys that peft learned after 0.14 are left out: their default is what is meant, and older readers warn about or
    refuse keys that they do not know.

    Args:
        ranks: module name to rank; the most frequent rank is `r`, the others go into the patterns.
        base_name: the base, an id or a path.
        base_revision: its revision.
        exclude: modules that have the ending of one in `ranks`, but no update.
        invocation: tokens from which on the adapter acts (aLoRA); None for one that always does.
        dora: whether magnitudes belong to the factors.
    """
    counts = Counter(ranks.values())
    r = max(counts, key=lambda rank: (counts[rank], rank))
    patterns = {exact_pattern(name): rank for name, rank in ranks.items() if rank != r}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": base_revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,  # An integer: Ollama reads no other number.
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "use_rslora": False,
        "use_dora": dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted({ending(name) for name in ranks}),
        "exclude_modules": list(exclude) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
    }
    return config if invocation is None else {**config, "alora_invocation_tokens": list(invocation)}
