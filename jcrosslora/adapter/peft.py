"""Read and write PEFT's format, `adapter_config.json` with `adapter_model.safetensors`, and live peft models."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter.combining import Layout, fuse
from jcrosslora.adapter.contents import WriteRequest, file_factors, safetensors_bytes
from jcrosslora.adapter.experts import expert_config, expert_tensors
from jcrosslora.adapter.folder import CONFIG, WEIGHTS
from jcrosslora.adapter.names import PREFIX, by_weight, ending, exact_pattern, natural_key
from jcrosslora.adapter.other_changes import replaced_config, replaced_tensors, token_config, token_ranks, token_tensors
from jcrosslora.adapter.reading import open_state_dict, read_adapter
from jcrosslora.adapter.records import Adapter
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.wrapped import TEXT, prefix_of, text_module_name
from jcrosslora.errors import AdapterError, OutputError, UsageError


def write_portable(contents: WriteRequest, folder: Path) -> None:
    """Write all modules at one rank, padded with zeros, and lora_alpha == r, which every engine reads the same way."""
    write_peft(contents, folder, contents.rank)


def write_peft(contents: WriteRequest, folder: Path, rank: int | None = None) -> None:
    """Write each module's own rank, by `rank_pattern` and `alpha_pattern`, and all other changes; see `peft_state`.

    The magnitudes of a DoRA stay in float32, because only their small difference from the row norms matters.
    """
    tensors, config = peft_state(contents, rank)
    # As bytes, because the writer of safetensors hides the system's error (disk full).
    (folder / WEIGHTS).write_bytes(safetensors_bytes(tensors, {**contents.metadata, "format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def peft_state(contents: WriteRequest, rank: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors by their names in a file, and the configuration.

    All modules are padded with zeros to `rank`; None keeps each module's own.
    """
    _check_parameters(contents)
    tensors: dict[str, np.ndarray] = {}
    for name, factors in contents.modules.items():
        a, b = file_factors(name, factors, contents.dtype, rank)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        if contents.magnitudes is not None:
            tensors[f"{name}.lora_magnitude_vector"] = np.ascontiguousarray(contents.magnitudes[name])
    adapter = contents.adapter
    tensors |= token_tensors(adapter.tokens, contents.dtype)
    tensors |= replaced_tensors(adapter.replaced, adapter.modules, contents.dtype)
    tensors |= expert_tensors(adapter.experts, contents.dtype)
    ranks = {name: rank or factors.rank for name, factors in adapter.modules.items()}
    config = peft_config(contents, ranks | token_ranks(adapter.tokens))
    of_tokens, of_others = token_config(adapter.tokens), replaced_config(adapter.replaced, adapter.modules)
    saved = [*of_tokens.get("modules_to_save", ()), *map(contents.class_name, of_others.get("modules_to_save", ()))]
    config |= of_tokens | of_others | {"modules_to_save": saved or None}
    named = {f"{PREFIX}{contents.class_name(name)}": array for name, array in tensors.items()}
    return named, config | expert_config(contents, config)


def _check_parameters(contents: WriteRequest) -> None:
    """Refuse DoRA magnitudes and aLoRA tokens where peft adapts parameters, for which it supports neither."""
    named = sorted({*contents.by_weight, *(update.name for update in contents.adapter.experts)}, key=natural_key)
    if not named or (contents.magnitudes is None and contents.adapter.info.invocation is None):
        return
    kept = "magnitudes (DoRA)" if contents.magnitudes is not None else "invocation tokens (aLoRA)"
    msg = f"peft adapts {named[0]!r} of this base ({len(named)} in all) as a parameter, for which it knows no {kept}: "
    raise OutputError(msg + "use another profile, or an adapter without these modules")


def peft_config(contents: WriteRequest, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Make the `adapter_config.json` for modules of these ranks, all with scale 1.

    Keys that peft added after 0.14 are left out: their defaults are right, and older readers warn about unknown keys or
    refuse them. In a multimodal class other parts have modules with the same endings, so modules are listed by their
    whole names; so are the weights of modules that peft only adapts by weight.
    """
    whole = contents.prefix != TEXT
    weights = {contents.class_name(name) for name in contents.by_weight}
    ranks = {contents.class_name(name): rank for name, rank in ranks.items()}
    targets = [name for name in ranks if name not in weights]
    # Of an adapter of experts alone, whose ranks `expert_config` states.
    counts = Counter(ranks.values()) or Counter(update.a.shape[1] for update in contents.adapter.experts)
    r = max(counts, key=lambda rank: (counts[rank], rank))
    patterns = {exact_pattern(name, by_weight=name in weights): rank for name, rank in ranks.items() if rank != r}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": contents.base_name,
        "revision": None if contents.base is None else contents.base.revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,  # an integer: some readers decode nothing else
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        **dict.fromkeys(("use_rslora", "lora_bias", "fan_in_fan_out"), False),
        **dict.fromkeys(("modules_to_save", "layers_to_transform", "layers_pattern", "layer_replication")),
        "use_dora": contents.magnitudes is not None,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": sorted(targets, key=natural_key) if whole else sorted({ending(name) for name in targets}),
        "exclude_modules": None if whole else list(contents.exclude) or None,
    }
    config |= {"target_parameters": [f"{name}.weight" for name in ranks if name in weights]} if weights else {}
    tokens = contents.adapter.info.invocation
    return config | ({} if tokens is None else {"alora_invocation_tokens": list(tokens)})


def adapter_from_peft(
    model: Any, adapter_name: str | None = None, *, base: BaseModel | None = None, rank: int | None = None
) -> Adapter:
    """Read an adapter of a live `peft.PeftModel`, of any kind that can be read from files.

    `adapter_name` None takes the active one; for `base` and `rank` see `load_adapter`. Raises AdapterError if the model
    has no such adapter, or one of a kind that is refused (named).
    """
    from peft import get_peft_model_state_dict

    configs: Mapping[str, Any] = model.peft_config
    active = getattr(model, "active_adapter", None)
    name = adapter_name or (active if isinstance(active, str) else next(iter(configs), ""))
    if name not in configs:
        raise AdapterError(f"the model has no adapter {name!r}; it has {', '.join(configs) or 'none'}")
    # As peft writes it: enumerations become strings and sets become lists.
    stated = json.dumps(configs[name].to_dict(), default=lambda it: sorted(it) if isinstance(it, Set) else str(it))
    config = json.loads(stated)
    # Copies of base weights are not needed, and to look for resized embeddings peft would ask the hub.
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return read_adapter(open_state_dict(tensors, config, base, name=f"peft adapter {name}", rank=rank))


def to_peft(adapter: Adapter, model: Any, adapter_name: str = "default", *, fused: Layout | None = None) -> Any:
    """Load an adapter into a live model, in float32, and make it the active one.

    Args:
        model: a transformers model, whose linear layers are wrapped in place; or a `peft.PeftModel`, which gets one
            more adapter.
        adapter_name: a name that the model does not have yet.
        fused: the layout of the base's fused modules (`base.fused`); updates of their parts are merged, see `fuse`.

    Returns:
        The `peft.PeftModel`.

    Raises:
        AdapterError: the model lacks a module of the adapter or has the name already, peft refuses the adapter, or a
            tensor was not loaded (named).
    """
    try:
        import torch
        from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    except ImportError as error:
        msg = f"a live model needs torch and peft, and {error.name} is not installed: pip install 'jcrosslora[torch]'"
        raise UsageError(msg) from error

    live = model if isinstance(model, PeftModel) else None
    if live is not None and adapter_name in live.peft_config:
        raise AdapterError(f"the model has an adapter {adapter_name!r} already; choose another adapter_name")
    wrapped: Any = model if live is None else live.get_base_model()
    names = {text_module_name(name): name for name, _ in wrapped.named_modules()}
    merged = fuse(adapter.modules, fused or {})
    if missing := [name for name in merged if name not in names]:
        msg = f"{adapter.info.name}: the model has no module {missing[0]!r} ({len(missing)} such modules); give the "
        raise AdapterError(msg + "base that the adapter is for, and fused=base.fused if that has fused modules")
    contents = WriteRequest(
        dataclasses.replace(adapter, modules=merged),
        prefix=prefix_of(names[next(iter(merged))]),
        by_weight=by_weight(merged, wrapped.config.get_text_config().model_type, {}),
    )
    tensors, config = peft_state(contents)
    del config["peft_type"]
    # By full name: these and no others.
    named = [name for name in (*merged, *token_ranks(adapter.tokens)) if name not in contents.by_weight]
    config["target_modules"] = [contents.class_name(name) for name in named]
    try:
        if live is None:
            live = get_peft_model(model, LoraConfig(**config), adapter_name)
        else:
            live.add_adapter(adapter_name, LoraConfig(**config))
        state = {key: torch.from_numpy(array) for key, array in tensors.items()}
        result = set_peft_model_state_dict(live, state, adapter_name)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        msg = f"{adapter.info.name}: peft cannot load the adapter into this model: {' '.join(str(error).split())[:200]}"
        raise AdapterError(msg) from error
    _check_loaded(adapter.info.name, live, adapter_name, result)
    live.set_adapter(adapter_name)
    return live


def _check_loaded(name: str, live: Any, adapter_name: str, result: Any) -> None:
    stored = {key: value.data_ptr() for key, value in live.state_dict().items() if f".{adapter_name}." in f"{key}."}
    # By address, because a head that is tied to the embedding shares its trained rows under a second name.
    loaded = {address for key, address in stored.items() if key not in set(result.missing_keys)}
    unloaded = [*result.unexpected_keys, *(key for key, address in stored.items() if address not in loaded)]
    if unloaded:
        msg = f"{name}: tensor {unloaded[0]!r} was not loaded into the model ({len(unloaded)} in all)"
        raise AdapterError(msg + "; give the base that the adapter is for")
