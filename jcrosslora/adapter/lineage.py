"""The adapters that an adapter was moved from, as the record of its transfer states them."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from jcrosslora.adapter.folder import REPORT, AdapterFiles, open_weights
from jcrosslora.adapter.records import Earlier
from jcrosslora.errors import AdapterError
from jcrosslora.utils.files import read_small_text


def read_record(files: AdapterFiles, header: Mapping[str, Any]) -> dict[str, Any]:
    """Read the record of a transfer from the report in the folder, and from the header of the weights.

    The header overrides the report, which may belong to other weights.
    """
    found: Any = {}
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(read_small_text(files.weights.parent / REPORT))
    found = found if isinstance(found, dict) else {}
    for key, value in header.items():
        name = key.removeprefix("jcrosslora.")
        if name != key and name != "version":
            with suppress(ValueError, TypeError, RecursionError):
                found[name] = json.loads(value)
    return found


def earlier_of(record: Mapping[str, Any]) -> tuple[Earlier, ...]:
    """Return what the adapter of a record was moved from, the original first; nothing if it was not moved."""
    if not isinstance(record.get("recipe"), dict):
        return ()
    before: tuple[Earlier, ...] = ()
    with suppress(msgspec.ValidationError, KeyError, TypeError):
        before = msgspec.convert(record["adapter"]["earlier"], tuple[Earlier, ...])
    keys = ("adapter", "name"), ("adapter", "digest"), ("source", "name"), ("source", "digest"), ("recipe", "method")
    return (*before, Earlier(*(text_of(record, *path) for path in keys)))


def told(earlier: Sequence[Earlier], base: str) -> str:
    """Say how an adapter came to its base, in a phrase: "A of BASE, moved to BASE by METHOD, moved to ..."."""
    bases = *(one.base for one in earlier[1:]), base
    moves = (f"moved to {name} by {one.method}" for one, name in zip(earlier, bases, strict=True))
    return ", ".join([f"{earlier[0].adapter} of {earlier[0].base}", *moves])


def text_of(record: Any, *keys: str) -> str | None:
    """Return a text inside nested objects; None if it is not there, empty, or no text."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, str) and record else None


def read_header(files: AdapterFiles) -> Mapping[str, Any]:
    """Read the metadata of a safetensors file; of another file, or a damaged one, there are none."""
    try:
        return open_weights(files.weights).metadata if files.form in ("PEFT", "MLX") else {}
    except AdapterError:  # reading its tensors says what is wrong
        return {}
