"""The hub: repository names, downloads, explanations of failed requests, and public names for local paths."""

import dataclasses
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import msgspec

from jcrosslora.checkpoint.config import read_config
from jcrosslora.checkpoint.safetensors import INDEX, SINGLE, read_weight_map, shards_of
from jcrosslora.checkpoint.store import FileNames
from jcrosslora.errors import CheckpointError
from jcrosslora.utils.texts import safe_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Files of a model except its weights and its card.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_PATIENCE = 1.5  # seconds in which a request that cannot be made has failed
_CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
# A path of two names or more, from the root, a home, a drive or a server. In a text it is whole within quotation marks,
# else it ends at a space; it is no part of an address, except after two slashes: https://huggingface.co//home/ann/model.
_ROOT, _SEPARATOR = r"(?:file:/*+|~/|[A-Za-z]:[\\/]++|\\\\++|/)", r"[\\/]++"
_NAME = r"""[^\s\\/"'`<>()\[\]{}|*?:,;]++"""
_QUOTED = rf"""(?<=["'`]){_ROOT}[^\n"'`\\/]++{_SEPARATOR}[^\n"'`]++(?=["'`])"""
_UNQUOTED = rf"(?:(?<![\w/.\\~-])|(?<=[^:/]/)){_ROOT}(?:{_NAME}{_SEPARATOR})+{_NAME}"
_PATH_IN_TEXT = re.compile(f"{_QUOTED}|{_UNQUOTED}")
_PATH = re.compile(rf"(?:{_ROOT}|\.\.?/)[^\n\\/]++{_SEPARATOR}.+")
_TEMPLATES = ('"chat_template"', '"template"')  # keys of a tokenizer's configuration
_JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*+"?+(\s*+:)?', re.DOTALL)


def is_hub_id(ref: str) -> bool:
    """Whether `ref` has the form "org/name" and is not the name of a weight file."""
    return _HUB_ID.fullmatch(ref) is not None and not ref.endswith((".gguf", ".safetensors", ".bin"))


def is_on_hub(ref: str | None) -> bool:
    """Whether `ref` has the form of a hub id and no local file or folder has that name."""
    return ref is not None and is_hub_id(ref) and not Path(ref).exists()


def public_name(ref: str | None) -> str | None:
    """Return the public name of a base or an adapter: its hub id, or the last part of its path."""
    if not ref or is_on_hub(ref):
        return ref
    path = Path(ref.replace("\\", "/"))
    return path.name or path.resolve().name or None


def public_names(refs: Iterable[str]) -> list[str]:
    """Return the public form of each reference, with a number after it if another has the same."""
    found: list[str] = []
    for ref in refs:
        name = public_name(ref) or ref
        every = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        found.append(next(one for one in every if one not in found))
    return found


def cached_identity(folder: Path) -> tuple[str, str] | None:
    """Return (hub id, commit) of a folder models--org--name/snapshots/commit of a hub cache, else None."""
    parts = folder.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or (match := _CACHE_FOLDER.fullmatch(parts[-3])) is None:
        return None
    return f"{match[1]}/{match[2]}", parts[-1]


def home_of(folder: Path) -> Path:
    """Return the folder that must contain all files of `folder`: itself, or its repository in a hub cache."""
    home = folder.resolve()
    return home.parents[1] if cached_identity(folder) else home


def check_revision(ref: str | Path, path: Path, wanted: str | None) -> None:
    """Raise CheckpointError if a revision is requested and local files are not known to be of it."""
    identity = cached_identity(path)
    if wanted is not None and (identity is None or identity[1] != wanted):
        known = "which no revision is known" if identity is None else f"revision {identity[1]}"
        msg = f"{ref}: is a local path of {known}; expected revision {wanted!r}: leave it out, or give a hub id"
        raise CheckpointError(msg)


def fetch(hub_id: str, revision: str | None, *, any_class: bool = False) -> Path:
    """Fetch the needed files of a hub model into the local cache.

    The revision is a branch, tag or commit; None stands for the default branch. `any_class` accepts models that this
    package does not read, and fetches all their weights.

    Returns:
        The snapshot folder in the cache; its name is the resolved commit.

    Raises:
        CheckpointError: not found, gated, offline and not cached, or a configuration that is not supported.
    """
    folder = _snapshot(hub_id, revision, ["*.json"])
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        msg = f"{hub_id}: the repository has no config.json (repositories of GGUF files have none): download the GGUF "
        raise CheckpointError(msg + "file and give its path, or choose a safetensors model")
    # Refuses an unsupported model before its weights are fetched.
    names = FileNames() if any_class else read_config(folder).names
    shards = [SINGLE]
    if (folder / INDEX).exists():
        shards = shards_of(read_weight_map(folder / INDEX), names)
    if all((folder / shard).exists() for shard in shards):
        return folder
    folder = _snapshot(hub_id, folder.name, ["*.json", *shards])
    for shard in shards:
        if not (folder / shard).exists():  # Offline, snapshot_download returns an incomplete snapshot without an error.
            msg = f"{hub_id}: {shard} is neither in the cache nor on the hub: go online, or choose a safetensors model"
            raise CheckpointError(msg)
    return folder


def fetch_companions(hub_id: str, revision: str | None) -> Path:
    """Fetch the other files of a model into the same folder: tokenizer, chat template, licence; see `fetch`."""
    return _snapshot(hub_id, revision, list(COMPANIONS))


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    # Imported here because the import is slow and only hub ids need it.
    from huggingface_hub import snapshot_download

    return download(snapshot_download, hub_id, revision=revision, allow_patterns=patterns)


def download(fetcher: Callable[..., str], hub_id: str, *names: str, **options: Any) -> Path:
    """Call a function of the hub's client that downloads; if the hub does not answer, it looks in the cache alone.

    Raises CheckpointError if it is not found, gated, or not in the cache while the hub cannot be reached.
    """
    from huggingface_hub import constants

    offline = {} if reaches_hub() else {"local_files_only": True}
    try:
        return Path(fetcher(hub_id, *names, **options, **offline))
    except failures() as error:
        at = f" at revision {options['revision']!r}" if options.get("revision") else ""
        msg = f"{hub_id}{at}: no such local folder, "
        if offline:
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
            msg += f"not whole in the hub's cache, and the hub cannot be reached ({why}): check the network"
            raise CheckpointError(msg + ", or give the folder of a copy") from error
        msg += f"and the hub did not provide {names[0] if names else 'it'} ({cause_of(error)}): check the name"
        raise CheckpointError(msg + ", the revision and your access to it") from error


def reaches_hub() -> bool:
    """Tell whether the hub answers one request; the result is kept for half a minute.

    The client itself tries a request five times, which takes 25 s without a network.
    """
    return _answers(int(time.monotonic()) // 30)


@lru_cache(maxsize=1)
def _answers(_: int) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    failed: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=2 * _PATIENCE)
        except failures():
            failed.append(True)

    if constants.HF_HUB_OFFLINE:
        return False
    # The look-up of a name has no time limit. A hub that is only slow is left to the client, which waits longer.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return not failed


def failures() -> tuple[type[Exception], ...]:
    """Return the errors that the hub's client raises if a file is not available."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # The parents of HfHubHTTPError are OSError and the HTTPError of the HTTP library, which differs between versions of
    # huggingface_hub; together they cover refused, offline and broken connections.
    return cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, EntryNotFoundError, ValueError))


def cause_of(error: BaseException, limit: int = 200) -> str:
    """Return the kind of an error and its message, as `safe_line` shortens it."""
    return f"{type(error).__name__}: {safe_line(error, limit)}".removesuffix(": ")


def public_text(text: str) -> str:
    """Return a text of others with the last part of each path alone; relative paths in a longer text stay."""
    if _PATH.fullmatch(text):
        return public_name(text) or ""
    return _PATH_IN_TEXT.sub(lambda match: public_name(match.group()) or "", text)


def public_json(text: str) -> str:
    """Return a JSON file of others with the `public_name` of each `name_or_path`, and `public_text` of other values.

    A chat template stays as it is: a model reads its text.
    """
    key = ""

    def replaced(match: re.Match[str]) -> str:
        nonlocal key
        if match[1]:
            key = match.group()
            return key
        if key.startswith(_TEMPLATES):
            return match.group()
        try:
            value = json.loads(match.group(), strict=False)
        except ValueError:  # not JSON
            return public_text(match.group())
        public = public_name(value) if 'name_or_path"' in key else public_text(value)
        return match.group() if public == value else json.dumps(public, ensure_ascii=False)

    return _JSON_TEXT.sub(replaced, text)


def local_names(*refs: str | None) -> dict[str, str]:
    """Map the paths among references, and the hub cache's path, to their public names, for `publish`."""
    from huggingface_hub import constants

    found = {constants.HF_HUB_CACHE: "hub"}
    for ref in refs:
        name = public_name(ref)
        # A bare name reveals nothing, and replacing it could change unrelated text.
        if ref and name and ref != name and ("/" in ref or "\\" in ref or ref.startswith("~")):
            found[ref] = name
            found[str(Path(ref).expanduser().absolute())] = name
    return found


def publish(value: Any, names: Mapping[str, str]) -> Any:
    """Replace paths in all strings of a JSON value or record, longer paths first."""
    pattern = re.compile("|".join(re.escape(path) for path in sorted(names, key=len, reverse=True)))

    def replaced(value: Any) -> Any:
        if isinstance(value, str) and names:
            return pattern.sub(lambda match: names[match.group()], value)
        if isinstance(value, Mapping):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(replaced, value))
        if isinstance(value, msgspec.Struct):
            return type(value)(**{name: replaced(getattr(value, name)) for name in value.__struct_fields__})
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return type(value)(**{one.name: replaced(getattr(value, one.name)) for one in dataclasses.fields(value)})
        return value

    return replaced(value)
