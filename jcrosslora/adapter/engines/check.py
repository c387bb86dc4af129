"""Tell which engines read an adapter and compute the same update with it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jcrosslora.adapter.engines import llamacpp, mlx, ollama, peft, sglang, vllm
from jcrosslora.adapter.engines.facts import AdapterFacts, read_facts
from jcrosslora.adapter.engines.rules import Engine, Rule
from jcrosslora.adapter.folder import Form
from jcrosslora.checkpoint import BaseModel

ENGINES: tuple[Engine, ...] = (
    *(peft.PEFT, vllm.VLLM, sglang.SGLANG, llamacpp.OF_PEFT, llamacpp.OF_GGUF, mlx.MLX),
    *(ollama.OF_PEFT, ollama.OF_GGUF),
)
_PROFILES: Mapping[Form, str] = {"PEFT": "portable", "MLX": "mlx", "GGUF": "gguf"}


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
    path: str | Path, base_family: str | None = None, *, base: BaseModel | None = None
) -> tuple[EngineVerdict, ...]:
    """Say for each engine whether it reads an adapter. Only the names and shapes of tensors are read.

    Args:
        path: a PEFT adapter folder of any kind, one in the format of MLX, or an adapter of llama.cpp: a .gguf file or
            a folder with `adapter.gguf`.
        base_family: "llama", "qwen2", "gemma2", ...; without it the rules on architectures become notes.
        base: the base that the adapter is for, which gives its family; the names of modules are compared with its own.

    Raises:
        AdapterError: not an adapter, or a file of it cannot be read.
    """
    facts = read_facts(Path(path), base_family, base)
    return tuple(_verdict(name, facts) for name in dict.fromkeys(engine.name for engine in ENGINES))


def _verdict(name: str, facts: AdapterFacts) -> EngineVerdict:
    entries: dict[Form, Engine] = {engine.form: engine for engine in ENGINES if engine.name == name}
    engine = entries.get(facts.form)
    if engine is None:
        profile = _PROFILES[next(iter(entries))]
        reason = f"it does not read the format of {facts.form}: write the adapter with "
        return EngineVerdict(name, False, (f"{reason}`jcrosslora export --profile {profile}`",))
    reasons = facts.faults or _answers(engine.rules, facts)
    return EngineVerdict(name, not reasons, reasons, () if facts.faults else _answers(engine.notes, facts))


def _answers(asked: Iterable[Rule], facts: AdapterFacts) -> tuple[str, ...]:
    return tuple(answer for rule in asked if (answer := rule(facts)) is not None)
