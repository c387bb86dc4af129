"""What a visitor of the page may name: the demo's files, hub ids, and files that they upload.

Paths of the machine that serves the page are refused, unless it is the visitor's own.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jcrosslora as jcl
from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.session.demo import GEMMA3, SMOLLM2, SOURCE_ADAPTER, shipped
from jcrosslora.session.demo.run import ANSWER_TOKENS, COMPLETIONS

ADAPTER, SOURCE, TARGET = "adapter", "source", "target"
DEMO = {
    ADAPTER: "demo: answers in JSON",
    SOURCE: f"demo: {SMOLLM2.hub_id.partition('/')[2]}",
    TARGET: f"demo: {GEMMA3.hub_id.partition('/')[2]}",
}
SETTINGS = "settings.json"
_PROMPTS = "prompts.txt"
_MOST_COMPLETIONS = 600


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.

    Attributes:
        names: of adapter, source and target: a name of `DEMO`, a hub id, or a path.
        uploads: the files of those of the three that were uploaded, which count in place of the name.
        method: a name that `jcrosslora methods` lists, or "auto".
        completions: how many an update is fitted to, where the method fits one.
        prompts: of the adapter's task, one a line; may be empty.
    """

    names: Mapping[str, str]
    uploads: Mapping[str, Sequence[str]] = field(default_factory=dict)
    method: str = "auto"
    completions: int = COMPLETIONS
    prompts: str = ""

    def needs_demo_bases(self) -> bool:
        """Tell whether a base of the demo has to be there."""
        return any(self.names[what] == DEMO[what] and not self.uploads.get(what) for what in (SOURCE, TARGET))


def write_settings(request: Request, folder: Path, demo_bases: tuple[Path, Path] | None, *, local: bool) -> None:
    """Write the settings of a transfer, the uploaded files and the prompts into the folder of a job.

    Args:
        request: what was asked for.
        folder: of the job; its process runs in it.
        demo_bases: source and target of the demo, if it needs them.
        local: whether the visitor is at this machine: then paths count, and the cache is used.

    Raises:
        JCrossLoRAError: a name is no hub id, an upload cannot be used, or the method is unknown.
    """
    settings: dict[str, Any] = {"out": "moved", "cache": local} | _method(request)
    for what in (ADAPTER, SOURCE, TARGET):
        if uploaded := request.uploads.get(what):
            settings[what] = _keep(uploaded, folder / what)
        elif request.names[what] == DEMO[what]:
            settings |= _demo(what, demo_bases)
        else:
            settings[what] = _checked(what, request.names[what].strip(), local=local)
    if request.prompts.strip():
        (folder / _PROMPTS).write_text(request.prompts, encoding="utf-8")
        settings["prompts"] = _PROMPTS
    (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def _method(request: Request) -> dict[str, Any]:
    """Return the method with its settings; a name is looked up in the registry, and never imported."""
    name, known = request.method, jcl.methods.METHODS
    if name != jcl.methods.AUTO and name not in known:
        msg = f"method {name!r} is unknown: choose one of {', '.join((jcl.methods.AUTO, *known))}"
        raise jcl.MethodError(msg)
    if not 1 <= request.completions <= _MOST_COMPLETIONS:
        msg = f"completions is {request.completions}: choose 1 to {_MOST_COMPLETIONS}"
        raise jcl.UsageError(msg)
    settings = {"completions": request.completions}
    if request.names[ADAPTER] == DEMO[ADAPTER] and not request.uploads.get(ADAPTER):
        settings["answer_tokens"] = ANSWER_TOKENS
    return {"method": name} | {
        key: value for key, value in settings.items() if name == jcl.methods.AUTO or hasattr(known[name], key)
    }


def _demo(what: str, bases: tuple[Path, Path] | None) -> dict[str, Any]:
    if what == ADAPTER:
        with shipped(SOURCE_ADAPTER) as path:
            return {ADAPTER: str(path)}
    assert bases is not None
    return {SOURCE: str(bases[0])} if what == SOURCE else {TARGET: str(bases[1]), "target_id": GEMMA3.hub_id}


def _checked(what: str, name: str, *, local: bool) -> str:
    if local and name and not (is_hub_id(name) and not Path(name).exists()):
        return str(Path(name).expanduser().absolute())
    if is_hub_id(name):
        return name
    came = f"the name of the {what} is {name[:100]!r}" if name else f"the {what} has no name"
    msg = f"{came}, expected a hub id of the form owner/name: give one, or upload the files; paths are not opened here"
    raise jcl.UsageError(msg)


def _keep(uploaded: Sequence[str], folder: Path) -> str:
    """Copy uploaded files to a folder of the job; return the path that opens them, relative to the job's folder."""
    folder.mkdir()
    names = [Path(path).name for path in uploaded]
    if twice := {name for name in names if names.count(name) > 1}:
        msg = f"the {folder.name} has two files named {min(twice)}: upload the files of one folder"
        raise jcl.UsageError(msg)
    for path, name in zip(uploaded, names, strict=True):
        shutil.copyfile(path, folder / name)
    if len(names) == 1 and names[0].endswith(".gguf"):
        return f"{folder.name}/{names[0]}"
    return folder.name
