"""Tell which engines read an adapter and compute the same update with it.

The rules were read in the engines' sources, which the two tables of engines name with the time of reading. Engines
change, so a verdict is a forecast, not a test run.
"""

from dataclasses import dataclass
from pathlib import Path

from jcrosslora.adapter.engines.facts import AdapterFacts, read_facts
from jcrosslora.adapter.engines.gguf import GGUF_ENGINES
from jcrosslora.adapter.engines.rules import Engine
from jcrosslora.adapter.engines.safetensors import SAFETENSORS_ENGINES
from jcrosslora.adapter.folder import Form
from jcrosslora.checkpoint import BaseModel

_ENGINES = SAFETENSORS_ENGINES + GGUF_ENGINES
_NAMES = ("PEFT", "vLLM", "SGLang", "llama.cpp", "MLX", "Ollama")
_PROFILES: dict[Form, str] = {"PEFT": "portable", "MLX": "mlx", "GGUF": "gguf"}


@dataclass(frozen=True)
class EngineVerdict:
    """What to expect of one engine.

    Attributes:
        engine: its name.
        reads: whether it loads the adapter and computes the update that was trained.
        reasons: why not; empty if it does.
        notes: what the user has to do or know besides.
    """

    engine: str
    reads: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_engines(
    path: str | Path,
    base_family: str | None = None,
    base_tied: bool | None = None,
    *,
    base: BaseModel | None = None,
) -> tuple[EngineVerdict, ...]:
    """Say for each engine whether it reads an adapter. Only the names and shapes of tensors are read.

    Args:
        path: a PEFT adapter folder of any kind, one in the format of MLX, or an adapter of llama.cpp: a .gguf file or
            a folder with `adapter.gguf`.
        base_family: "llama", "qwen2", "gemma2", ...; without it the rules on architectures become notes.
        base_tied: whether the base's output head is its embedding (`BaseModel.tied`); None if it is not known.
        base: the base that the adapter is for, which gives its family and `base_tied`; the names of modules are
            compared with its own.

    Raises:
        AdapterError: not an adapter, or a file of it cannot be read.
    """
    facts = read_facts(Path(path), base_family, base_tied, base)
    return tuple(_verdict(name, facts) for name in _NAMES)


def _verdict(name: str, facts: AdapterFacts) -> EngineVerdict:
    entries: dict[Form, Engine] = {engine.form: engine for engine in _ENGINES if engine.name == name}
    engine = entries.get(facts.form)
    if engine is None:
        profile = _PROFILES[next(iter(entries))]
        reason = f"it does not read the format of {facts.form}: write the adapter with "
        return EngineVerdict(name, False, (f"{reason}`jcrosslora export --profile {profile}`",))
    if facts.faults:
        return EngineVerdict(name, False, facts.faults)
    reasons, notes = (
        tuple(answer for rule in rules if (answer := rule(facts)) is not None) for rules in (engine.rules, engine.notes)
    )
    return EngineVerdict(name, not reasons, reasons, notes)
