"""The licence that the model card beside an adapter states."""

import re
from contextlib import suppress
from pathlib import Path

_LONGEST = 1 << 16  # bytes of a card that are read
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)


def stated_licence(folder: Path) -> str | None:
    """Return the licence in the front matter of a folder's README.md; None where there is none that can be read."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    # A damaged card is no reason to refuse the adapter.
    with suppress(OSError), card.open("rb") as file:
        found = _FRONT_MATTER.match(file.read(_LONGEST).decode("utf-8", errors="replace"))
        return None if found is None else _licence(found[1])
    return None


def _licence(front_matter: str) -> str | None:
    import yaml  # it comes with huggingface_hub

    with suppress(yaml.YAMLError, ValueError, RecursionError):
        data = yaml.safe_load(front_matter)
        licence = data.get("license") if isinstance(data, dict) else None
        return licence if isinstance(licence, str) and licence else None
    return None
