"""Prepare an adapter's folder for upload: check that its files are complete, and make a card that the hub accepts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from jcrosslora.adapter.engines import read_facts
from jcrosslora.adapter.folder import (
    CARD,
    CHAT_TEMPLATE,
    CONFIG,
    AdapterPaths,
    Form,
    find_adapter,
    join_card,
    open_weights,
    public_card,
    read_config,
    split_card,
)
from jcrosslora.adapter.gguf import open_gguf_adapter
from jcrosslora.checkpoint.hub import (
    home_of,
    is_hub_id,
    is_on_hub,
    public_json,
    public_name,
    public_text,
)
from jcrosslora.errors import AdapterError, UsageError
from jcrosslora.report.documents import PAGE, report_text, without_examples
from jcrosslora.report.recipe import RECIPE
from jcrosslora.report.record import REPORT, read_report
from jcrosslora.text import COMPLETIONS
from jcrosslora.utils.files import read_small_text
from jcrosslora.utils.texts import markdown_text

_BASE_KEYS: Mapping[Form, str] = {"PEFT": "base_model_name_or_path", "MLX": "model"}
_LICENCES = ("LICENSE", "NOTICE")  # prefixes of the names of licence files
_LIBRARIES: Mapping[Form, str] = {"PEFT": "peft", "MLX": "mlx", "GGUF": "gguf"}
_BASE_TAG = "base_model:"


@dataclass(frozen=True, eq=False)
class Upload:
    """The files of an adapter to upload, and notes."""

    files: Mapping[str, Path | bytes]  # name in the repository -> a file on disk, or the content to send
    weights: str
    base_model: str | None  # hub id
    notes: tuple[str, ...]  # what the user should know, one sentence each without a full stop


def collect(folder: str | Path, *, base_model: str | None = None, with_completions: bool = False) -> Upload:
    """Check an adapter's folder and collect the files to upload. Nothing is sent, and the folder does not change.

    Args:
        folder: the folder of a PEFT or MLX adapter, or of `adapter.gguf`.
        base_model: hub id of the base; None takes the one that the card or the configuration names.
        with_completions: whether report and card keep the completions that the source wrote, and `completions.jsonl`
            and the page of `jcrosslora report` are uploaded too.

    Raises:
        AdapterError: the folder is not a whole adapter, its card or report is damaged, or a text file is a link that
            leads out of the folder.
        UsageError: `base_model` is not a hub id.
    """
    folder = Path(folder).expanduser()
    if base_model is not None and not is_hub_id(base_model):
        raise UsageError(f"base model {base_model!r} is not a hub id: give one such as owner/name, or leave it out")
    files = _whole_adapter(folder)
    _check_links(folder)
    config = {} if files.config is None else read_config(files.config)
    card = _text(folder / CARD) if (folder / CARD).is_file() else None
    key = _BASE_KEYS.get(files.form, "")
    stated = config.get(key)
    stated = stated if isinstance(stated, str) and stated else None
    named = _bases_of(card)
    base = base_model or (named[0] if len(named) == 1 else None) or (stated if is_on_hub(stated) else None)
    sent: dict[str, Path | bytes] = {files.weights.name: files.weights}
    if files.config is not None:
        sent[CONFIG] = _config_for_hub(files.config, config, key, base_model or (None if is_on_hub(stated) else base))
    if card is not None:
        card = public_card(card if with_completions else without_examples(card))
    sent[CARD] = _card_for_hub(card, folder.resolve().name, files.form, base).encode()
    if (folder / REPORT).is_file():
        sent[REPORT] = _report_for_hub(folder / REPORT, with_completions=with_completions)
    sent |= {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and _goes_along(path.name)}
    if RECIPE in sent:
        sent[RECIPE] = public_text(_text(folder / RECIPE)).encode()
    if with_completions:  # the page shows some completions
        sent |= {name: folder / name for name in (COMPLETIONS, PAGE) if (folder / name).is_file()}
    left = tuple(sorted(path.name for path in folder.iterdir() if path.name not in sent))
    return Upload(sent, files.weights.name, base, _notes(base, stated, left, several=base is None and len(named) > 1))


def _whole_adapter(folder: Path) -> AdapterPaths:
    """Return the files of an adapter, after a check of the names, shapes and sizes of its tensors."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder: give the folder of an adapter, such as --out of a transfer")
    files = find_adapter(folder)
    if files.form == "Orbax":
        msg = f"{folder}: is a checkpoint of Orbax, unknown to the hub: write it with `jcrosslora export` first"
        raise AdapterError(msg)
    facts = read_facts(folder)
    if facts.fault is not None:
        raise AdapterError(f"{folder}: is not a whole adapter ({facts.fault}): write it again")
    gguf = files.form == "GGUF"
    header = open_gguf_adapter(files.weights).header.metadata if gguf else open_weights(files.weights).metadata
    if any(isinstance(value, str) and public_text(value) != value for value in header.values()):
        msg = f"{files.weights}: its header holds a path of the machine that wrote it: write the adapter again with "
        raise AdapterError(msg + "`jcrosslora export`, which leaves that out")
    return files


def _check_links(folder: Path) -> None:
    """Raise AdapterError for text files that link out of the folder, because they would publish another file.

    A folder in the hub's cache consists of links; they may lead to anywhere in the cache of the same repository.
    """
    home = home_of(folder)
    for path in sorted(folder.iterdir()):
        text = path.name in (CARD, REPORT, COMPLETIONS, PAGE, CONFIG) or _goes_along(path.name)
        if text and path.is_symlink() and not path.resolve().is_relative_to(home):
            msg = f"{path}: is a link that leads out of the folder: put a copy of the file there, or remove the link"
            raise AdapterError(msg)


def _config_for_hub(path: Path, config: Mapping[str, Any], key: str, base: str | None) -> bytes:
    """Return the configuration without local paths, and with `base` if it is given."""
    stated = config.get(key)
    wanted = base or (public_name(stated) if isinstance(stated, str) else stated)
    text = _text(path) if wanted == stated else json.dumps({**config, key: wanted}, indent=2)
    return public_json(text).encode()


def _report_for_hub(path: Path, *, with_completions: bool) -> bytes:
    try:
        report = read_report(path)
    except UsageError as error:
        raise AdapterError(str(error)) from error
    whole = with_completions or not report.examples
    text = _text(path) if whole else report_text(msgspec.structs.replace(report, examples=()))
    return public_json(text).encode()


def _goes_along(name: str) -> bool:
    return name in (RECIPE, CHAT_TEMPLATE) or name.startswith(_LICENCES)


def _notes(base: str | None, stated: str | None, left: tuple[str, ...], *, several: bool) -> tuple[str, ...]:
    notes = []
    if several:
        notes.append("the card names several base models, which stay; name one with --base-model (base_model=)")
    elif base is None:
        called = f", as {public_name(stated)!r} is no hub id" if stated else ""
        notes.append(f"the card names no base model{called}; give its hub id with --base-model (base_model=)")
    if left:
        notes.append(f"not uploaded, as it is no part of the adapter: {', '.join(left)}")
    return tuple(notes)


def _text(path: Path) -> str:
    try:
        return read_small_text(path)
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}): mend or remove it"
        raise AdapterError(msg) from error


def _bases_of(card: str | None) -> list[str]:
    """Return the hub ids of the bases that a card names; none if one of them is not a hub id."""
    stated = None if card is None else split_card(card)[0].get("base_model")
    named = stated if isinstance(stated, list) else [stated]
    found = [one for one in named if isinstance(one, str) and is_on_hub(one)]
    return found if len(found) == len(named) else []


def _card_for_hub(card: str | None, name: str, form: Form, base_model: str | None) -> str:
    """Return the card to upload; without a card, a short one titled `name`.

    The base model and its relation are set; without a base they are removed, because the hub refuses a local path.
    Several bases stay if `base_model` is None. Missing library and tags are added, and everything else stays, such as
    the licence. A card whose metadata is right already does not change.
    """
    of_base = "" if base_model is None else f" of `{base_model}`"
    short = f"\n# {markdown_text(name)}\n\nA LoRA adapter{of_base}.\n"
    data, body = split_card(short if card is None else card)
    several = base_model is None and len(_bases_of(card)) > 1
    wanted = dict(data)
    if not several:
        stated = {} if base_model is None else {"base_model": base_model, "base_model_relation": "adapter"}
        wanted = stated | {
            key: value for key, value in data.items() if key not in ("base_model", "base_model_relation")
        }
    if not wanted.get("library_name"):
        wanted["library_name"] = _LIBRARIES[form]
    if not several:
        tags = data.get("tags") or ()
        kept = [str(tag) for tag in ([tags] if isinstance(tags, str) else tags) if not str(tag).startswith(_BASE_TAG)]
        own = [] if base_model is None else [f"{_BASE_TAG}adapter:{base_model}"]
        wanted["tags"] = [*own, *kept, *(["lora"] if "lora" not in kept else [])]
    return card if card is not None and wanted == data else join_card(wanted, body)
