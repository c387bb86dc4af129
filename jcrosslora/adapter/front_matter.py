"""The metadata of a model card: the YAML in front of the text of a README.md, which the hub reads."""

import re
from collections.abc import Mapping
from typing import Any

from jcrosslora.errors import AdapterError

_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n|(?<=\n))---[ \t]*(?:\r?\n|$)", re.DOTALL)


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Split a card into its metadata, empty where it has none, and the text below.

    Raises:
        AdapterError: the metadata is not a YAML mapping.
    """
    found = _FRONT_MATTER.match(text)
    if found is None:
        return {}, text
    import yaml  # it comes with huggingface_hub

    try:
        data = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        msg = "README.md: its metadata is not YAML: mend the lines between the two --- at its top"
        raise AdapterError(msg) from error
    if data is not None and not isinstance(data, dict):
        msg = f"README.md: its metadata is a {type(data).__name__}, wanted lines of `name: value`: mend its top"
        raise AdapterError(msg)
    return data or {}, text[found.end() :]


def join_card(data: Mapping[str, Any], body: str) -> str:
    """Return a card with this metadata above the text."""
    import yaml

    matter = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=1 << 20)
    return f"---\n{matter}---\n{body}"
