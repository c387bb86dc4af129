"""Adapters as plain nested dicts of arrays, for `jax.tree.map`, optimisers and `nnx` states."""

from collections.abc import Iterator, Mapping
from typing import Any

from jcrosslora.adapter.factors import Array, LoRAFactors
from jcrosslora.adapter.names import text_module_name
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.adapter.weights import as_numpy
from jcrosslora.errors import AdapterError

Leaves = dict[str, dict[str, Any]]


def to_pytree(adapter: Adapter) -> Leaves:
    """Return {module: {"a": (K, I), "b": (O, K), "scale": float}}, all of them leaves.

    Changes of embedding and head, and the provenance, are not part of it.
    """
    return {name: {"a": item.a, "b": item.b, "scale": item.scale} for name, item in adapter.modules.items()}


def from_pytree(tree: Mapping[Any, Any], name: str = "memory") -> Adapter:
    """Make an adapter of a tree of arrays; the inverse of `to_pytree`.

    Args:
        tree: numpy, JAX or torch arrays, or an `nnx.State`. Every mapping with keys "a" and "b", and perhaps "scale"
            (1 if absent), is the update of a module; the keys that lead to it, joined by dots, are its name.
        name: for `info.name`.

    Raises:
        AdapterError: no update in the tree, other keys beside "a" and "b", or arrays that do not fit together.
    """
    modules = {text_module_name(module): _factors(module, parts) for module, parts in _updates(tree, ())}
    if not modules:
        msg = f"{name}: no update in the tree; give {{module: {{'a': (K, I), 'b': (O, K), 'scale': float}}}}"
        raise AdapterError(msg)
    return Adapter(modules, AdapterInfo(name=name))


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
    return LoRAFactors(a=a, b=b, scale=float(_value(parts.get("scale", 1.0))))


def _value(leaf: Any) -> Any:
    """Unwrap a variable of `nnx`."""
    return leaf.get_value() if hasattr(leaf, "get_value") else leaf


def _array(leaf: Any) -> Array:
    value = _value(leaf)
    # A tracer or a device array stays where it is.
    return value if hasattr(value, "ndim") and not hasattr(value, "detach") else as_numpy(value)
