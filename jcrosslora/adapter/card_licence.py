"""The licence that the model card beside an adapter states."""

from contextlib import suppress
from pathlib import Path

_LONGEST = 1 << 16  # bytes of a card that are read


def stated_licence(folder: Path) -> str | None:
    """Return the licence in the front matter of a folder's README.md; None where there is none that can be read."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    import yaml  # it comes with huggingface_hub
    from huggingface_hub import ModelCard

    # A damaged card is no reason to refuse the adapter.
    with suppress(OSError, ValueError, TypeError, AttributeError, yaml.YAMLError), card.open("rb") as file:
        text = file.read(_LONGEST).decode("utf-8", errors="replace")
        licence = ModelCard(text, ignore_metadata_errors=True).data.to_dict().get("license")
        return licence if isinstance(licence, str) and licence else None
    return None
