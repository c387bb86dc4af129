"""Adapters out of live peft models, and into live transformers models."""

import json
from collections.abc import Mapping
from typing import Any

from jcrosslora.adapter.contents import Contents
from jcrosslora.adapter.fused import Layout, fuse
from jcrosslora.adapter.opening import open_state_dict
from jcrosslora.adapter.reading import read_adapter
from jcrosslora.adapter.records import Adapter
from jcrosslora.adapter.token_files import token_ranks
from jcrosslora.adapter.weight_targets import by_weight
from jcrosslora.adapter.write_peft import peft_state
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.wrapped import prefix_of, text_module_name
from jcrosslora.errors import AdapterError


def adapter_from_peft(
    model: Any, adapter_name: str | None = None, *, base: BaseModel | None = None, rank: int | None = None
) -> Adapter:
    """Read an adapter of a live `peft.PeftModel`, of every kind that is read from files.

    Args:
        model: left as it is.
        adapter_name: None takes the active adapter.
        base: see `load_adapter`.
        rank: see `load_adapter`.

    Raises:
        AdapterError: the model has no such adapter, or one of a kind that is refused (named).
    """
    from peft import get_peft_model_state_dict

    name = _adapter_name(model, adapter_name)
    # As peft writes it: enumerations become strings and sets become lists.
    config = json.loads(json.dumps(model.peft_config[name].to_dict(), default=_jsonable))
    # Copies of base weights are not needed, and to look for resized embeddings peft would ask the hub.
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return read_adapter(open_state_dict(tensors, config, base, name=f"peft adapter {name}", rank=rank))


def to_peft(adapter: Adapter, model: Any, adapter_name: str = "default", *, fused: Layout | None = None) -> Any:
    """Load an adapter into a live model, in float32, and make it the active one.

    Args:
        adapter: at least one module.
        model: of transformers, whose linear layers are wrapped in place; or a `peft.PeftModel`, which gets one more
            adapter.
        adapter_name: a name that the model does not have yet.
        fused: the layout of the base's fused modules (`base.fused`); updates of their parts are merged, see `fuse`.

    Returns:
        The `peft.PeftModel`.

    Raises:
        AdapterError: the model lacks a module of the adapter or has the name already, peft refuses the adapter, or a
            tensor was not loaded (named).
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    live = model if isinstance(model, PeftModel) else None
    if live is not None and adapter_name in live.peft_config:
        msg = f"the model has an adapter {adapter_name!r} already; choose another adapter_name"
        raise AdapterError(msg)
    wrapped: Any = model if live is None else live.get_base_model()
    names = {text_module_name(name): name for name, _ in wrapped.named_modules()}
    merged = fuse(adapter.modules, fused or {})
    if missing := [name for name in merged if name not in names]:
        msg = f"{adapter.info.name}: the model has no module {missing[0]!r} ({len(missing)} such modules); give the "
        raise AdapterError(msg + "base that the adapter is for, and fused=base.fused if that has fused modules")
    prefix = prefix_of(names[next(iter(merged))])
    contents = Contents(
        merged,
        prefix=prefix,
        by_weight=by_weight(merged, wrapped.config.get_text_config().model_type, {}),
        invocation=adapter.info.invocation,
        tokens=adapter.tokens,
        replaced=adapter.replaced,
        experts=adapter.experts,
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
    own = {key: value.data_ptr() for key, value in live.state_dict().items() if f".{adapter_name}." in f"{key}."}
    # By address, because a head that is tied to the embedding shares its trained rows under a second name.
    loaded = {address for key, address in own.items() if key not in set(result.missing_keys)}
    unloaded = [*result.unexpected_keys, *(key for key, address in own.items() if address not in loaded)]
    if unloaded:
        msg = f"{name}: tensor {unloaded[0]!r} was not loaded into the model ({len(unloaded)} in all)"
        raise AdapterError(msg + "; give the base that the adapter is for")


def _adapter_name(model: Any, wanted: str | None) -> str:
    configs: Mapping[str, Any] = model.peft_config
    active = getattr(model, "active_adapter", None)
    name = wanted or (active if isinstance(active, str) else next(iter(configs), ""))
    if name not in configs:
        msg = f"the model has no adapter {name!r}; it has {', '.join(configs) or 'none'}"
        raise AdapterError(msg)
    return name


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
