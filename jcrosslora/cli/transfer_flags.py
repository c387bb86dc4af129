"""The flags of `jcrosslora transfer`, derived from the settings of a transfer and the fields of the methods."""

import dataclasses
from typing import Annotated, Any, Union, get_args, get_origin

import tyro

from jcrosslora.methods import AUTO, METHODS, setting_fields
from jcrosslora.session.settings import OWN_FIELDS, TransferSettings
from jcrosslora.utils.attribute_docs import attribute_docs

Flag = tuple[str, Any, Any]


def setting_flags() -> list[Flag]:
    """Return the settings of a transfer as dataclass fields for tyro; those without a default are required."""
    docs = attribute_docs(TransferSettings)
    flags: list[Flag] = []
    for name, field in OWN_FIELDS.items():
        kind: Any = str if name == "method" else field.type
        text = docs[name]
        if name == "method":
            text = f"{text.removesuffix('.')}: {', '.join((AUTO, *METHODS))}; or MODULE:CLASS for one of your own."
        arg = tyro.conf.arg(help=text)
        kind = Annotated[kind, tyro.conf.Positional, arg] if name == "adapter" else Annotated[kind, arg]
        flags.append((name, kind, dataclasses.field(default=field.default)))
    required = [flag for flag in flags if flag[2].default is dataclasses.MISSING]
    return required + [flag for flag in flags if flag[2].default is not dataclasses.MISSING]


def method_flags() -> list[Flag]:
    """Return the hyper-parameters of all methods as optional dataclass fields; None leaves a method's default."""
    flags: list[Flag] = []
    for name, by_method in setting_fields().items():
        text = next(attribute_docs(METHODS[method]).get(name, "") for method in by_method)
        defaults: dict[str, list[str]] = {}
        for method, field in by_method.items():
            defaults.setdefault(_shown(field.default), []).append(method)
        stated = "; ".join(f"{', '.join(methods)}: {default}" for default, methods in defaults.items())
        kind = next(iter(by_method.values())).type
        arg = tyro.conf.arg(help=f"{text} ({stated})", help_behavior_hint="", metavar=_metavar(kind))
        flags.append((name, Annotated[kind | None, arg], dataclasses.field(default=None)))
    return flags


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metavar(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])} ..."
    if get_origin(kind) is Union or len(get_args(kind)) > 1:
        return "|".join(_metavar(item) for item in get_args(kind) if item is not type(None))
    return getattr(kind, "__name__", str(kind)).upper()
