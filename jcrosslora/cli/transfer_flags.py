"""The flags of `jcrosslora transfer` that are derived: the settings of a transfer, and the fields of the methods."""

import dataclasses
from typing import Any

import tyro

from jcrosslora.methods import METHODS, setting_fields
from jcrosslora.session.settings import OWN_FIELDS, TransferSettings
from jcrosslora.utils.attribute_docs import attribute_docs

Flag = tuple[str, Any, Any]


def setting_flags() -> list[Flag]:
    """Return the settings of a transfer as dataclass fields; those without a default are required."""
    kinds: dict[str, Any] = {name: field.type for name, field in OWN_FIELDS.items()}
    kinds |= {"adapter": tyro.conf.Positional[str], "method": str}
    return [(name, kinds[name], dataclasses.field(default=field.default)) for name, field in OWN_FIELDS.items()]


def method_flags() -> list[Flag]:
    """Return the hyper-parameters of all methods as optional dataclass fields; None leaves a method's default."""
    kinds: dict[str, Any] = {name: next(iter(fields.values())).type for name, fields in setting_fields().items()}
    return [(name, kind | None, dataclasses.field(default=None)) for name, kind in kinds.items()]


def flag_docs() -> dict[str, str]:
    """Return the help of all these flags; a hyper-parameter's ends with the default of each method."""
    docs = dict(attribute_docs(TransferSettings))
    docs["method"] = "How to move it: a method's name, MODULE:CLASS of your own, or auto, which looks at both bases."
    docs["cache"] = "Neither look for factors and transports in the user's cache folder nor keep them there."
    for name, by_method in setting_fields().items():
        text = next(attribute_docs(METHODS[method]).get(name, "") for method in by_method)
        defaults: dict[str, list[str]] = {}
        for method, field in by_method.items():
            defaults.setdefault(_shown(field.default), []).append(method)
        stated = "; ".join(f"{', '.join(names)}: {value}" for value, names in defaults.items())
        docs[name] = f"{text} ({stated})"
    return docs


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
