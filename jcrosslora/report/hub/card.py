"""The model card as it is uploaded: the user's own, with metadata that the hub accepts."""

from collections.abc import Mapping
from typing import Any

from jcrosslora.adapter.folder import Form
from jcrosslora.adapter.front_matter import join_card, split_card
from jcrosslora.checkpoint.hub import is_on_hub
from jcrosslora.utils.texts import markdown_text

_LIBRARIES: Mapping[Form, str] = {"PEFT": "peft", "MLX": "mlx", "GGUF": "gguf"}
_BASE_TAG = "base_model:"


def card_base(card: str) -> str | None:
    """Return the hub id of the base that a card names; None where it names none, a local path or several.

    Raises:
        AdapterError: the metadata of the card is not a YAML mapping.
    """
    stated = split_card(card)[0].get("base_model")
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    return stated if isinstance(stated, str) and is_on_hub(stated) else None


def names_several(card: str) -> bool:
    """Tell whether a card names several bases by their hub ids, as that of an adapter for all of them may.

    Raises:
        AdapterError: the metadata of the card is not a YAML mapping.
    """
    stated = split_card(card)[0].get("base_model")
    return (
        isinstance(stated, list) and len(stated) > 1 and all(isinstance(one, str) and is_on_hub(one) for one in stated)
    )


def card_for_hub(card: str | None, *, name: str, form: Form, base_model: str | None) -> str:
    """Return the card to upload; one whose metadata is right already is not changed.

    The base model and its relation are set or, as the hub refuses a local path there, removed; library and tags are
    added where they are missing. Everything else stays, the licence among it: none is made up. So do several bases,
    if none is given.

    Args:
        card: the text of README.md; None writes a short one.
        name: of the adapter, the title of a new card.
        form: the format of the adapter.
        base_model: the hub id of the base; None if it has none.

    Raises:
        AdapterError: the metadata of the card is not a YAML mapping.
    """
    data, body = split_card(f"\n# {markdown_text(name)}\n\n{_sentence(base_model)}\n" if card is None else card)
    several = card is not None and base_model is None and names_several(card)
    wanted = dict(data) if several else _with_base(data, base_model)
    if not wanted.get("library_name"):
        wanted["library_name"] = _LIBRARIES[form]
    if not several:
        wanted["tags"] = _tags(data.get("tags"), base_model)
    return card if card is not None and wanted == data else join_card(wanted, body)


def _with_base(data: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """Return the metadata with this base, in the place where the base was."""
    base = {} if base_model is None else {"base_model": base_model, "base_model_relation": "adapter"}
    rest = {key: value for key, value in data.items() if key not in ("base_model", "base_model_relation")}
    return base | rest


def _tags(stated: Any, base_model: str | None) -> list[str]:
    tags = [stated] if isinstance(stated, str) else list(stated or ())
    own = [] if base_model is None else [f"{_BASE_TAG}adapter:{base_model}"]
    kept = [str(tag) for tag in tags if not str(tag).startswith(_BASE_TAG)]
    return [*own, *kept, *(["lora"] if "lora" not in kept else [])]


def _sentence(base_model: str | None) -> str:
    return "A LoRA adapter." if base_model is None else f"A LoRA adapter of `{base_model}`."
