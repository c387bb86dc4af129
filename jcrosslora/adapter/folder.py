"""Find the files of an adapter and their format: a folder, a hub repository, a GGUF file or a checkpoint.

The licence of an adapter is read from the YAML header of its model card, README.md.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jcrosslora.adapter.contents import as_adapter_errors, check_names
from jcrosslora.adapter.gguf import GGUF_WEIGHTS, is_gguf_adapter
from jcrosslora.adapter.jax_trainers import LORA_CONFIG
from jcrosslora.adapter.orbax import holds_lora
from jcrosslora.checkpoint.hub import (
    check_revision,
    download,
    is_hub_id,
    is_on_hub,
    public_text,
    publish,
)
from jcrosslora.checkpoint.orbax import find_checkpoint, nearest_file
from jcrosslora.checkpoint.safetensors import SafetensorsFile
from jcrosslora.checkpoint.store import errors_of, read_json_object, refuse_not_finite
from jcrosslora.errors import AdapterError
from jcrosslora.utils.files import read_small, read_small_text

CARD = "README.md"
REPORT = "transfer_report.json"
CONFIG = "adapter_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"
GGUF_ENDING = ".gguf"
Form = Literal["PEFT", "MLX", "GGUF", "Orbax"]
_WEIGHTS = {"PEFT": WEIGHTS, "MLX": MLX_WEIGHTS}


@dataclass(frozen=True)
class AdapterPaths:
    """The files of an adapter.

    Attributes:
        name: the path or hub id that was given.
        weights: the weights file; for Orbax the folder of a checkpoint.
        config: `adapter_config.json`, or for Orbax `lora_config.json`; None if the weights file holds the
            configuration, or there is none.
        folder: of the adapter, with its documents; None for a single .gguf file, whose folder may hold unrelated files.
    """

    name: str
    form: Form
    weights: Path
    config: Path | None = None
    folder: Path | None = None

    def read_document(self, name: str, limit: int | None = None) -> str | None:
        """Read a text file in the adapter's folder, at most `limit` bytes of it; None if it cannot be read."""
        with suppress(OSError):
            if self.folder is not None:
                return read_small(self.folder / name)[:limit].decode("utf-8", errors="replace")
        return None


def find_adapter(ref: str | Path, revision: str | None = None) -> AdapterPaths:
    """Find an adapter: a folder (of PEFT, of MLX, of Orbax, or with `adapter.gguf`), a .gguf file, or a hub id.

    An AdapterError tells which file is missing or cannot be read, or that a local folder is not of the revision.
    """
    try:
        folder = Path(ref).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # no such home directory, or too long a name
        msg = f"{str(ref)[:80]}: not a path ({error}): give a folder with {CONFIG} and {WEIGHTS}, or a hub id"
        raise AdapterError(msg) from error
    if is_there:
        with as_adapter_errors():
            check_revision(ref, folder, revision)
    if is_folder:
        return _local_files(folder)
    if is_there and folder.suffix == GGUF_ENDING:
        return AdapterPaths(str(folder), "GGUF", folder, folder=folder.parent if folder.name == GGUF_WEIGHTS else None)
    if is_there:
        msg = f"{ref}: is a file; give the folder that holds {CONFIG} and {WEIGHTS}, or a {GGUF_ENDING} file"
        raise AdapterError(msg)
    if isinstance(ref, str) and is_hub_id(ref):
        return _hub_files(ref, revision)
    msg = f"{ref}: no such folder: give a folder with {CONFIG} and {WEIGHTS}, or a hub id such as owner/name"
    raise AdapterError(msg)


def is_adapter(path: Path) -> bool:
    """Return whether a local path is an adapter of any format, perhaps damaged, and not a base model."""
    if path.is_dir():
        checkpoint = find_checkpoint(path)
        named = any((path / name).exists() for name in (CONFIG, GGUF_WEIGHTS))
        return named or (checkpoint is not None and holds_lora(checkpoint))
    return path.suffix == GGUF_ENDING and path.is_file() and is_gguf_adapter(path)


def read_config(path: Path) -> dict[str, Any]:
    """Read the JSON object of finite numbers in an `adapter_config.json`."""
    with as_adapter_errors():
        config = read_json_object(path)
        with errors_of(path):
            refuse_not_finite(config)
        return config


def check_imports_nothing(files: AdapterPaths) -> None:
    """Refuse an adapter for which PEFT would import a module that its configuration names."""
    if files.config is not None and (named := read_config(files.config)).get("megatron_config"):
        msg = f"{files.name}: its megatron_core names a Python module, {named.get('megatron_core')!r}, which is not "
        raise AdapterError(msg + "imported: give an adapter without megatron_config")


def open_weights(path: Path) -> SafetensorsFile:
    """Open a weights file and check its header and the length of its tensor names."""
    with as_adapter_errors():
        file = SafetensorsFile(path)
    check_names(path, file.entries)
    return file


def form_of(config: Mapping[str, Any]) -> Form:
    """Return the format of an `adapter_config.json`: only MLX has no `peft_type`."""
    mlx = "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)
    return "MLX" if mlx else "PEFT"


def _local_files(folder: Path) -> AdapterPaths:
    if not (folder / CONFIG).is_file():
        if (folder / GGUF_WEIGHTS).is_file():
            return AdapterPaths(str(folder), "GGUF", folder / GGUF_WEIGHTS, folder=folder)
        if (checkpoint := find_checkpoint(folder)) is not None:
            return AdapterPaths(str(folder), "Orbax", checkpoint, nearest_file(LORA_CONFIG, checkpoint, folder), folder)
        if (folder / "config.json").is_file():
            msg = f"{folder}: is a whole model, perhaps with an adapter merged into it: give the adapter's own folder, "
            raise AdapterError(msg + f"which holds {CONFIG}, from before it was merged")
        msg = f"{folder}: no {CONFIG} here: give the folder of an adapter of PEFT or MLX, or a {GGUF_ENDING} file"
        raise AdapterError(msg)
    form = form_of(read_config(folder / CONFIG))
    files = AdapterPaths(str(folder), form, folder / _WEIGHTS[form], folder / CONFIG, folder)
    if not files.weights.is_file():
        raise AdapterError(f"{folder}: {_missing_weights(folder, form)}")
    return files


def _hub_files(repo: str, revision: str | None) -> AdapterPaths:
    config = _download(repo, CONFIG, revision)
    form = form_of(read_config(config))
    for optional in (CARD, CHAT_TEMPLATE):  # the card states the licence; many adapters have neither
        with suppress(AdapterError):
            _download(repo, optional, revision)
    return AdapterPaths(repo, form, _download(repo, _WEIGHTS[form], revision), config, config.parent)


def _missing_weights(folder: Path, form: Form) -> str:
    if form == "MLX":
        return f"no {MLX_WEIGHTS} here, which belongs to the {CONFIG} of MLX: give the folder of a complete adapter"
    if (folder / PICKLE).is_file():
        why = f"only {PICKLE}, a pickle that can run code when it is read, and no {WEIGHTS}: if you trust it, load it "
        return why + "with peft and save it again with save_pretrained(..., safe_serialization=True)"
    if (folder / MLX_WEIGHTS).is_file():
        return f"{MLX_WEIGHTS} belongs to MLX but {CONFIG} to PEFT: give the two files of one adapter"
    return f"no {WEIGHTS} here: give the folder of a PEFT adapter"


def _download(repo: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    with as_adapter_errors():
        return download(hf_hub_download, repo, name, revision=revision)


_LONGEST = 1 << 16  # bytes of a card that are read


def stated_licences(files: AdapterPaths) -> dict[str, Any]:
    """Return the licence that an adapter's card states, by the fields of `AdapterInfo`; None if it states none.

    A link into the adapter's folder becomes a hub link or is left out, because the file does not move along.
    """
    data: dict[str, Any] = {}
    # A damaged card is no reason to refuse the adapter.
    with suppress(AdapterError):
        data = split_card(files.read_document(CARD, _LONGEST) or "")[0]
    keys = ("license", "license_name", "license_link")
    stated = (value if isinstance(value := data.get(key), str) and value else None for key in keys)
    licence, name, link = (value and public_text(value) for value in stated)
    if link is not None and not link.startswith(("https://", "http://")):
        where = f"https://huggingface.co/{files.name}/blob/main/{link.removeprefix('./')}"
        link = where if is_on_hub(files.name) else None
    return {"licence": licence, "licence_name": name, "licence_link": link}


def stated_template(folder: Path | None) -> str | None:
    """Return the chat template in a folder's chat_template.jinja; None if there is none that can be read."""
    if folder is None:
        return None
    with suppress(OSError, UnicodeDecodeError):
        text = read_small_text(folder / CHAT_TEMPLATE, _LONGEST)
        return text if text.strip() else None
    return None


_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n|(?<=\n))---[ \t]*(?:\r?\n|$)", re.DOTALL)


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Split a card into its metadata, a YAML mapping, empty if it has none, and the text below."""
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
        msg = f"README.md: its metadata is a {type(data).__name__}, expected lines of `name: value`: mend its top"
        raise AdapterError(msg)
    return data or {}, text[found.end() :]


def public_card(card: str) -> str:
    """Return a model card without local paths."""
    stated: Any = None
    with suppress(AdapterError):
        stated = split_card(card)[0].get("base_model")
    bases = stated if isinstance(stated, list) else [stated]
    # The path of a base, which may hold spaces, is replaced as it is written; then every other path.
    paths = {base: public_text(base) for base in bases if isinstance(base, str)}
    return public_text(publish(card, {path: name for path, name in paths.items() if name != path}))


def join_card(data: Mapping[str, Any], body: str) -> str:
    """Return a card with this metadata above the text."""
    import yaml

    matter = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=1 << 20)
    return f"---\n{matter}---\n{body}"
