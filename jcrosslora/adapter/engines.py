"""Which engines read an adapter and compute the same update with it, as a table of rules."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jcrosslora.adapter import engine_rules as rules
from jcrosslora.adapter.engine_rules import Rule
from jcrosslora.adapter.facts import AdapterFacts, read_facts
from jcrosslora.adapter.folder import Form
from jcrosslora.adapter.kinds.variants import ALORA


@dataclass(frozen=True)
class EngineVerdict:
    """What is to be expected of one engine.

    Attributes:
        engine: its name.
        reads: whether it loads the adapter and computes the update that it was trained as.
        reasons: why not; empty if it does.
        notes: what the user has to do or know besides.
    """

    engine: str
    reads: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """An engine and a format that it reads: the rules that give a reason against it, and those that give a note."""

    name: str
    rules: tuple[Rule, ...]
    notes: tuple[Rule, ...] = ()
    form: Form = "PEFT"


def check_engines(path: str | Path, base_family: str | None = None) -> tuple[EngineVerdict, ...]:
    """Say for each engine whether it reads an adapter. Tensors are not read, only their names and shapes.

    Args:
        path: a PEFT adapter folder of any kind, one in the format of MLX, or an adapter of llama.cpp: a .gguf file or
            a folder with `adapter.gguf`.
        base_family: "llama", "qwen2", "gemma2", ...; without it the rules on architectures become notes.

    Raises:
        AdapterError: not an adapter, or a file of it cannot be read.
    """
    facts = read_facts(Path(path), base_family)
    return tuple(_verdict(name, facts) for name in dict.fromkeys(engine.name for engine in ENGINES))


def _verdict(name: str, facts: AdapterFacts) -> EngineVerdict:
    entries: dict[Form, Engine] = {engine.form: engine for engine in ENGINES if engine.name == name}
    engine = entries.get(facts.form)
    if engine is None:
        form = next(iter(entries))
        reason = f"it does not read the format of {facts.form}: write the adapter with "
        return EngineVerdict(name, False, (f"{reason}`jcrosslora export --profile {_PROFILES[form]}`",))
    reasons = facts.faults or _answers(engine.rules, facts)
    return EngineVerdict(name, not reasons, reasons, () if facts.faults else _answers(engine.notes, facts))


def _answers(asked: Iterable[Rule], facts: AdapterFacts) -> tuple[str, ...]:
    return tuple(answer for rule in asked if (answer := rule(facts)) is not None)


_PROFILES: Mapping[Form, str] = {"PEFT": "portable", "MLX": "mlx", "GGUF": "gguf"}
_GGUF_LORA = (rules.gguf_lora, rules.only_tensors("A", "B", "embedding", norms=True), rules.gguf_family)


ENGINES: tuple[Engine, ...] = (
    Engine("PEFT", (rules.known_type, rules.prefix, rules.own_parts), (rules.pickle, rules.changes_base)),
    Engine(
        "vLLM",
        (
            rules.plain_lora(),
            rules.required_keys,
            rules.no_bias,
            rules.saved_modules,
            rules.only_tensors("A", "B", "embedding"),
            rules.vllm_rank,
        ),
        (rules.pickle, rules.vllm_rank_flag, rules.vllm_patterns, rules.vllm_embedding),
    ),
    Engine(
        "SGLang",
        (rules.plain_lora(), rules.own_parts, rules.sglang_patterns, rules.sglang_rslora),
        (rules.pickle, rules.sglang_tensors),
    ),
    Engine(
        "llama.cpp",
        (
            rules.plain_lora(ALORA),
            rules.only_tensors("A", "B", "embedding", "copy", norms=True),
            rules.alpha_over_rank,
        ),
        (rules.pickle, rules.llamacpp_convert, rules.llamacpp_head),
    ),
    Engine("llama.cpp", _GGUF_LORA, form="GGUF"),
    Engine("MLX", (rules.mlx_config, rules.mlx_names, rules.mlx_rank), form="MLX"),
    Engine(
        "Ollama",
        (
            rules.plain_lora(),
            rules.ollama_family,
            rules.ollama_alpha,
            rules.ollama_names,
            rules.ollama_rank,
            rules.alpha_over_rank,
        ),
        (rules.pickle, rules.ollama_family_note),
    ),
    Engine("Ollama", (*_GGUF_LORA, rules.gguf_always_acts), (rules.ollama_engine,), form="GGUF"),
)
