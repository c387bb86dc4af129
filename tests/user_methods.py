"""Methods in a user's own file: they take part in transfers, batches and the command line like any other."""

import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jcrosslora import Evidence, EvidenceKind, Maps
from jcrosslora.linalg import select
from jcrosslora.methods import METHODS, MapMethod, Moved, PadTruncate, Plan
from jcrosslora.utils import files

# Called with the plan of every adapter that `Hooked` moves; tests clear it (see `hooks` in conftest.py).
HOOKS: list[Callable[[Plan], object]] = []


@contextmanager
def methods_of_the_page(folder: Path) -> Iterator[dict[str, Any]]:
    """Import the modules of docs/adding-a-method.md from a folder, and give their names; then forget the methods."""
    page, before = Path(__file__).parent.parent / "docs" / "adding-a-method.md", dict(METHODS)
    modules = re.findall(r"^```python\n(# (\w+)\.py\n.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    sys.path.insert(0, str(folder))
    try:
        for code, name in modules:
            (folder / f"{name}.py").write_text(code)
        yield {key: found for _, name in modules for key, found in vars(importlib.import_module(name)).items()}
    finally:
        sys.path.remove(str(folder))
        for _, name in modules:
            sys.modules.pop(name, None)
        for name in METHODS.keys() - before:
            del METHODS[name]


@dataclass(frozen=True)
class HalfCopy(MapMethod):
    """Copy a share of the update by coordinates."""

    name: ClassVar[str] = "half-copy"
    summary: ClassVar[str] = "a share of the update, by coordinates"
    reference: ClassVar[str] = "the tests"

    share: float = 0.5
    """The factor that the copied update is multiplied by."""

    def maps(self, evidence: Evidence) -> Maps:
        """Return the maps of pad-truncate, with the share in the outer one."""
        ((p_out, p_in),) = PadTruncate().maps(evidence).terms
        return Maps(((select(p_out.index, self.share * p_out.gain, evidence.src.weight.shape[0]), p_in),))


@dataclass(frozen=True)
class Hooked(HalfCopy):
    """Call what a test wants to happen in the middle of a transfer."""

    name: ClassVar[str] = "hooked"

    def move(self, plan: Plan) -> Moved:
        """Call all hooks."""
        for hook in HOOKS:
            hook(plan)
        return super().move(plan)


@dataclass(frozen=True)
class Signed(HalfCopy):
    """Copy a share of the update, or the opposite of it."""

    name: ClassVar[str] = "signed"

    negative: bool = False
    """Whether to copy the opposite."""


@dataclass(frozen=True)
class Killed(HalfCopy):
    """Kill the process when the folder of adapter a1 is written and not yet in its place, the first time."""

    name: ClassVar[str] = "killed"

    def move(self, plan: Plan) -> Moved:
        """Leave a mark in the cache's folder, which all workers share, and have the process killed."""
        mark = Path(os.environ["JCROSSLORA_CACHE"]) / "killed"
        if Path(plan.adapter.info.name).name == "a1" and not mark.exists():
            mark.touch()
            files._put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return super().move(plan)


@dataclass(frozen=True)
class HookedOnText(Hooked):
    """The same with both bases run on text."""

    name: ClassVar[str] = "hooked-on-text"
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset({EvidenceKind.PROBE_TEXTS})
