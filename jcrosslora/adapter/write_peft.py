"""The format of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter.contents import Contents, file_factors, safetensors_bytes
from jcrosslora.adapter.experts import expert_config, expert_tensors
from jcrosslora.adapter.folder import CONFIG, WEIGHTS
from jcrosslora.adapter.names import PREFIX, ending, natural_key
from jcrosslora.adapter.patterns import exact_pattern
from jcrosslora.adapter.replaced_files import replaced_config, replaced_tensors
from jcrosslora.adapter.token_files import token_config, token_ranks, token_tensors
from jcrosslora.checkpoint.wrapped import TEXT
from jcrosslora.errors import OutputError


def write_portable(contents: Contents, folder: Path) -> None:
    """Write one rank, lower ones padded with zeros, and lora_alpha == r, which every engine reads the same way."""
    tensors, config = peft_state(dataclasses.replace(contents, tokens=(), replaced=(), experts=()), contents.rank)
    write_peft_files(folder, tensors, config, contents.metadata)


def write_peft(contents: Contents, folder: Path) -> None:
    """Write each module's own rank, by `rank_pattern` and `alpha_pattern`.

    Changes of the embedding and the head, and tensors that replace those of the base, are part of it. The magnitudes of
    a DoRA stay in float32: what they change is their small difference from the norms of the rows.
    """
    write_peft_files(folder, *peft_state(contents), contents.metadata)


def peft_state(contents: Contents, rank: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors by their names in a file, and the configuration.

    Args:
        contents: what to write.
        rank: of every module, lower ones are padded with zeros; None keeps each module's own.

    Raises:
        OutputError: values that are not finite or do not fit the dtype; or magnitudes or invocation tokens of modules
            for which peft knows neither.
    """
    _check_parameters(contents)
    tensors: dict[str, np.ndarray] = {}
    for name, factors in contents.modules.items():
        a, b = file_factors(name, factors, contents.dtype, rank)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        if contents.magnitudes is not None:
            tensors[f"{name}.lora_magnitude_vector"] = np.ascontiguousarray(contents.magnitudes[name])
    tensors |= token_tensors(contents.tokens, contents.dtype)
    tensors |= replaced_tensors(contents.replaced, contents.modules, contents.dtype)
    tensors |= expert_tensors(contents.experts, contents.dtype)
    ranks = {name: rank or factors.rank for name, factors in contents.modules.items()}
    config = peft_config(contents, ranks | token_ranks(contents.tokens))
    of_tokens, of_others = token_config(contents.tokens), replaced_config(contents.replaced, contents.modules)
    saved = [*of_tokens.get("modules_to_save", ()), *map(contents.class_name, of_others.get("modules_to_save", ()))]
    config |= of_tokens | of_others | {"modules_to_save": saved or None}
    return peft_names(contents, tensors), config | expert_config(contents, config)


def _check_parameters(contents: Contents) -> None:
    """Refuse what peft does not load for parameters: the magnitudes of a DoRA, and the tokens of an aLoRA."""
    named = sorted({*contents.by_weight, *(update.name for update in contents.experts)}, key=natural_key)
    if not named or (contents.magnitudes is None and contents.invocation is None):
        return
    kept = "magnitudes (DoRA)" if contents.magnitudes is not None else "invocation tokens (aLoRA)"
    msg = f"peft adapts {named[0]!r} of this base ({len(named)} in all) as a parameter, for which it knows no {kept}: "
    raise OutputError(msg + "use another profile, or an adapter without these modules")


def peft_names(contents: Contents, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name tensors as peft does: with its own prefix, then as the base's class names the module."""
    return {f"{PREFIX}{contents.class_name(name)}": array for name, array in tensors.items()}


def write_peft_files(
    folder: Path, tensors: dict[str, np.ndarray], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write the two files of PEFT.

    Args:
        folder: to write into.
        tensors: C-contiguous arrays by their names in the file.
        config: `adapter_config.json`.
        metadata: pairs of strings for the header of the weights file.
    """
    # As bytes, because safetensors' own writer hides the system's error (disk full) in one of its own.
    (folder / WEIGHTS).write_bytes(safetensors_bytes(tensors, {**metadata, "format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def peft_config(contents: Contents, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Make the `adapter_config.json` for modules of these ranks, all with scale 1.

    Keys that peft added after 0.14 are left out: their default is what is meant, and older readers warn about unknown
    keys or refuse them.

    In a multimodal class other parts have modules of the same endings, so modules are listed by their whole names; so
    are the weights of modules that peft adapts by them alone.

    Args:
        contents: the adapter.
        ranks: module name to rank; the most frequent rank is `r`, the others go into the patterns.
    """
    whole = contents.prefix != TEXT
    weights = {contents.class_name(name) for name in contents.by_weight}
    ranks = {contents.class_name(name): rank for name, rank in ranks.items()}
    targets = [name for name in ranks if name not in weights]
    # Of an adapter of experts alone, whose ranks `expert_config` states.
    counts = Counter(ranks.values()) or Counter(update.a.shape[1] for update in contents.experts)
    r = max(counts, key=lambda rank: (counts[rank], rank))
    patterns = {exact_pattern(name, by_weight=name in weights): rank for name, rank in ranks.items() if rank != r}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": contents.base_name,
        "revision": contents.base_revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,  # an integer, which is all that some readers decode
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "use_rslora": False,
        "use_dora": contents.magnitudes is not None,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(targets, key=natural_key) if whole else sorted({ending(name) for name in targets}),
        "exclude_modules": None if whole else list(contents.exclude) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
    }
    config |= {"target_parameters": [f"{name}.weight" for name in ranks if name in weights]} if weights else {}
    return config | ({} if contents.invocation is None else {"alora_invocation_tokens": list(contents.invocation)})
