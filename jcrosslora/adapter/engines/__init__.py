"""Predict which engines load an adapter and apply the same update.

The rules come from reading the engines' source code; `tables.py` lists the files and dates. Engines change, so a
verdict is a prediction, not a test run.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from jcrosslora.adapter.engines.rules import EngineFacts
from jcrosslora.adapter.engines.rules import read_facts as read_facts
from jcrosslora.adapter.engines.tables import ENGINES
from jcrosslora.adapter.folder import Form
from jcrosslora.adapter.reading import why_idle_files
from jcrosslora.checkpoint import BaseModel

_PROFILES: dict[Form, str] = {"PEFT": "portable", "MLX": "mlx", "GGUF": "gguf", "Orbax": "tunix"}


@dataclass(frozen=True)
class EngineVerdict:
    """What to expect of one engine.

    Attributes:
        reads: whether it loads the adapter and computes the update that was trained.
        reasons: why not; empty if it does.
        notes: what else the user has to do or know.
    """

    engine: str
    reads: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_engines(
    path: str | Path, base_family: str | None = None, base_tied: bool | None = None, *, base: BaseModel | None = None
) -> tuple[EngineVerdict, ...]:
    """Predict for each engine whether it reads an adapter, from tensor names and shapes; note if the adapter is idle.

    Args:
        path: a PEFT adapter folder of any kind, one in the format of MLX, or an adapter of llama.cpp: a .gguf file or
            a folder with `adapter.gguf`; an Orbax checkpoint with LoRA of a JAX trainer; or a hub id.
        base_family: "llama", "qwen2", "gemma2", ...; without it the rules on architectures become notes.
        base_tied: whether the base's output head is its embedding (`BaseModel.tied`); None if it is not known.
        base: the base that the adapter is for; it overrides `base_family` and `base_tied`, and module names are
            compared with its own.

    Raises:
        AdapterError: not an adapter, or a file of it cannot be read.
    """
    facts = read_facts(path, base_family, base_tied, base)
    idle = why_idle_files(path, base)
    found = (_verdict(name, facts) for name in ENGINES)
    return tuple(replace(one, notes=(*one.notes, idle)) if idle and one.reads else one for one in found)


def _verdict(name: str, facts: EngineFacts) -> EngineVerdict:
    formats = ENGINES[name]
    if facts.form not in formats:
        reason = f"it does not read the format of {facts.form}: write the adapter with "
        return EngineVerdict(name, False, (f"{reason}`jcrosslora export --profile {_PROFILES[next(iter(formats))]}`",))
    if (fault := facts.fault) is not None:
        return EngineVerdict(name, False, (fault,))
    reasons, notes = (
        tuple(answer for rule in rules if (answer := rule(facts)) is not None) for rules in formats[facts.form]
    )
    return EngineVerdict(name, not reasons, reasons, notes)
