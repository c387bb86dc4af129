"""Load an adapter of any kind from files, from the hub, from a live peft model or from arrays in memory.

Arrays in memory are plain nested dicts, as used by `jax.tree.map`, optimisers and `nnx` states. A DoRA is normally read
as a low-rank approximation of its full-rank update (see `kinds.dora`). To write it again for the same base, it can be
loaded unchanged.
"""

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter.changes import Array, LoRAFactors
from jcrosslora.adapter.contents import as_numpy
from jcrosslora.adapter.jax_trainers import trainer_of
from jcrosslora.adapter.kinds.dora import DORA, read_stored
from jcrosslora.adapter.kinds.kind import ParsedAdapter
from jcrosslora.adapter.peft import adapter_from_peft
from jcrosslora.adapter.reading import open_adapter, open_state_dict, open_trained, read_adapter
from jcrosslora.adapter.records import Adapter, AdapterInfo, check_numbers, ignored_sentence
from jcrosslora.checkpoint import BaseModel, text_module_name
from jcrosslora.checkpoint.in_memory import named_arrays
from jcrosslora.errors import AdapterError, UsageError


def load_adapter(
    ref: Any,
    base: BaseModel | None = None,
    *,
    revision: str | None = None,
    rank: int | None = None,
    config: Mapping[str, Any] | None = None,
    alpha: float | None = None,
    replaced: bool = False,
) -> Adapter:
    """Load an adapter: LoRA, or another kind that peft or its authors' code writes (`kinds.KINDS` lists them).

    Args:
        ref: one of
            a folder with `adapter_config.json` and `adapter_model.safetensors`, or MLX's `adapters.safetensors`;
            a .gguf file of llama.cpp, or a folder with `adapter.gguf`;
            an Orbax checkpoint with LoRA of tunix, qwix, MaxText or google-deepmind/gemma, or a folder of such steps;
            the hub id of a PEFT or MLX folder (`HF_HUB_OFFLINE` is respected; only the two files are downloaded);
            a live `peft.PeftModel`, see `adapter_from_peft`;
            a mapping: PEFT's state dict, with its `config`, LoRA of one of these JAX libraries, such as
                `nnx.state(model, nnx.LoRAParam)`, or a tree for `from_pytree`;
            an `Adapter`, which is returned unchanged.
        base: the model that it was trained on. Some kinds (DoRA, PiSSA, OLoRA, VeRA) are only defined with its
            weights or shapes, llama.cpp's q and k of a llama only with its heads, LoRA of MaxText only with its layers
            and heads. If it is given, changes of the embedding and the output head are read too, into `tokens`, and the
            size of other changes is known.
        revision: branch, tag or commit of the hub repository.
        rank: the rank to truncate updates to; None reads them exactly, but a DoRA, whose update has full rank, at twice
            the rank of its B A. `info.read_as` says what is lost.
        config: the `adapter_config.json` of a state dict.
        alpha: the alpha of qwix's LoraProvider, which the arrays do not contain; None takes it from a
            `lora_config.json` in the checkpoint's folder, or from MaxText's metadata.
        replaced: whether to also read biases, norms and whole layers that replace those of `base`; they fit no other
            base. Otherwise `info.ignored` lists them. The adapter may then have no update of a linear layer.

    Returns:
        The adapter, with factors a (K, I) and b (O, K), in their stored dtype for plain LoRA, and modules named as in
        the base (`model.layers.0.self_attn.q_proj`). The keys of the file decide which modules there are, not
        `target_modules`. `info.ignored` lists what does not move, including changes of embedding and head if there is
        no base.

    Raises:
        AdapterError: not found, damaged, of a refused kind (named), or of a kind that needs the base.
        UsageError: a rank below 1, or a `config` or `alpha` for something that has one.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"adapter rank {rank} is out of range; it must be at least 1")
    trained = isinstance(ref, Mapping) and trainer_of(named_arrays(ref)) is not None
    if alpha is not None and not trained and not isinstance(ref, str | Path):
        raise UsageError(f"alpha was given for a {type(ref).__name__} without LoRA of a JAX trainer; leave it out")
    if isinstance(ref, Mapping) and config is not None:
        return read_adapter(open_state_dict(ref, config, base, name="state dict", rank=rank))
    if config is not None:
        raise UsageError(f"config was given for a {type(ref).__name__}; it is only used with a state dict of PEFT")
    if isinstance(ref, Adapter):
        return check_numbers(ref)
    if hasattr(ref, "peft_config"):
        return adapter_from_peft(ref, base=base, rank=rank)
    if isinstance(ref, Mapping):
        if any(str(key).endswith(("lora_A.weight", "lora_B.weight")) for key in ref):
            msg = "a state dict of PEFT was given without its configuration, which holds the scale; give config=..."
            raise AdapterError(msg)
        if trained:
            return read_adapter(open_trained(ref, base, alpha=alpha, rank=rank))
        return from_pytree(ref)
    return read_adapter(open_adapter(ref, base, revision=revision, rank=rank, alpha=alpha), replaced=replaced)


def to_pytree(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """Return {module: {"a": (K, I), "b": (O, K), "scale": float}}, all leaves; other changes are left out."""
    return {name: {"a": item.a, "b": item.b, "scale": item.scale} for name, item in adapter.modules.items()}


def from_pytree(tree: Mapping[Any, Any], name: str = "memory") -> Adapter:
    """Make an adapter of a tree of arrays; the inverse of `to_pytree`.

    Args:
        tree: numpy, JAX or torch arrays, or an `nnx.State`. Every mapping with keys "a" and "b", and perhaps "scale"
            (1 if absent), is the update of a module; the keys that lead to it, joined by dots, are its name.
    """
    modules = {text_module_name(module): _factors(module, parts) for module, parts in _updates(tree, ())}
    if not modules:
        msg = f"{name}: no update in the tree; give {{module: {{'a': (K, I), 'b': (O, K), 'scale': float}}}}"
        raise AdapterError(msg)
    return check_numbers(Adapter(modules, AdapterInfo(name=name)))


def _updates(tree: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if {"a", "b"} <= tree.keys():
        yield ".".join(path), tree
        return
    for key, part in tree.items():
        if not isinstance(part, Mapping):
            msg = f"entry {'.'.join((*path, str(key)))!r} is not part of an update; an update has keys 'a' and 'b'"
            raise AdapterError(msg)
        yield from _updates(part, (*path, str(key)))


def _factors(module: str, parts: Mapping[str, Any]) -> LoRAFactors:
    if unknown := parts.keys() - {"a", "b", "scale"}:
        msg = f"module {module!r} has the unknown entry {min(map(str, unknown))!r}; use 'a', 'b' and 'scale'"
        raise AdapterError(msg)
    a, b = _array(parts["a"]), _array(parts["b"])
    if not 2 <= a.ndim == b.ndim <= 3 or a.shape[-2] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
        msg = f"module {module!r} has a of shape {list(a.shape)} and b of shape {list(b.shape)}; they must be (K, I) "
        raise AdapterError(msg + "and (O, K), both with a leading axis in a stack of adapters")
    scale = _value(parts.get("scale", 1.0))
    try:
        return LoRAFactors(a=a, b=b, scale=float(scale))
    except (TypeError, ValueError) as error:
        raise AdapterError(f"module {module!r} has scale {reprlib.repr(scale)}; expected a number") from error


def _value(leaf: Any) -> Any:
    """Unwrap a variable of `nnx`."""
    return leaf.get_value() if hasattr(leaf, "get_value") else leaf


def _array(leaf: Any) -> Array:
    value = _value(leaf)
    # A tracer or a device array stays unchanged.
    return value if hasattr(value, "ndim") and not hasattr(value, "detach") else as_numpy(value)


def load_dora(ref: str | Path, base: BaseModel | None = None) -> tuple[Adapter, dict[str, np.ndarray]]:
    """Read a DoRA without converting it to an update, see `kinds.dora`; arguments as for `load_adapter`.

    Its modules are checked against the base. A DoRA that was initialised as PiSSA or OLoRA needs one, because its B A
    was taken out of the weights. Returns s B A of each module, which alone is not its update, and m, float32 (O,).
    """
    file = open_adapter(ref, base)
    if file.kind is not DORA:
        msg = f"{file.origin.name}: a {file.kind.name} has no magnitudes that could be kept, expected a DoRA"
        raise AdapterError(msg + ": leave out --keep-dora")
    found = file.by_text_name(read_stored(file))
    if base is not None:
        for name, (factors, _) in found.items():
            _check_module(file, base, name, factors.shape)
        base.release()
    changes = {kind: [tensor.module for tensor in tensors] for kind, tensors in file.extras.items()}
    if file.others:
        changes["head"] = list(file.others)
    # Their share of the whole change is not known without the update.
    why = "a DoRA is kept with its linear layers alone"
    ignored = [ignored_sentence(kind, names, None, why) for kind, names in changes.items()]
    file.check_not_empty(found, ignored)
    info = file.info(ignored=(*file.stored.notes, *ignored), unread=bool(ignored))
    directions = Adapter({name: factors for name, (factors, _) in found.items()}, info)
    return directions, {name: magnitude for name, (_, magnitude) in found.items()}


def _check_module(file: ParsedAdapter, base: BaseModel, name: str, shape: tuple[int, int]) -> None:
    holder = next((whole for whole, parts in base.fused.items() if name in {part for part, _, _ in parts}), None)
    if holder is not None:
        msg = f"{file.path}: module {name!r} is rows of {holder!r} in the base {base.name}, and a DoRA can only "
        raise AdapterError(msg + "be kept for whole modules: give the base it was trained on")
    file.check_shape(name, shape, f"{DORA.name} is checked against its base")
