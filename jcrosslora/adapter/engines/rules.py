"""Rules that several engines share. A rule returns a sentence if an adapter breaks it, else None."""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from collections.abc import Callable
from dataclasses import dataclass

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.folder import Form
from jcrosslora.adapter.kinds.config_tables import VARIANTS
from jcrosslora.adapter.names import TensorName
from jcrosslora.adapter.patterns import module_alpha, module_rank

Rule = Callable[[AdapterFacts], str | None]


@dataclass(frozen=True)
class Engine:
    """An engine and a format that it reads: rules that give a reason against it, and rules that give a note."""

    name: str
    rules: tuple[Rule, ...]
    notes: tuple[Rule, ...] = ()
    form: Form = "PEFT"


def only_plain_lora(*supported: str) -> Rule:
    def rule(facts: AdapterFacts) -> str | None:
        if facts.peft_type != "LORA":
            return f"it reads only LoRA, this is {facts.peft_type or 'of no type'}"
        kinds = [kind for kind, applies in VARIANTS.items() if applies(facts.config) and kind not in supported]
        return f"it reads only plain LoRA, this is {', '.join(kinds)}" if kinds else None

    return rule


def only_tensors(*kinds: str, skipped: Callable[[TensorName], bool] = lambda _: False) -> Rule:
    """For an engine that refuses all other tensors, except those that it skips."""

    def rule(facts: AdapterFacts) -> str | None:
        other = [tensor for tensor in facts.tensors if tensor.kind not in kinds and not skipped(tensor)]
        return f"tensor {other[0].key!r} is not one of a LoRA ({len(other)} such tensors)" if other else None

    return rule


def no_parts_between_factors(facts: AdapterFacts) -> str | None:
    """Loaders ignore tensors between lora_A and lora_B without an error in files of these two kinds."""
    other = [tensor.key for tensor in facts.tensors if tensor.kind in ("latent", "lora_gate")]
    return f"only LoRA-XS's or BeamLoRA's own repository reads tensor {other[0]!r}" if other else None


def alpha_over_rank(facts: AdapterFacts) -> str | None:
    """For an engine that reads one alpha and takes the rank from the tensor."""
    if facts.peft_type != "LORA":
        return None
    alpha, ranks = facts.config["lora_alpha"], {module: shape[0] for module, shape in facts.factors("A").items()}
    wrong = [module for module, scale in facts.scales().items() if abs(alpha / ranks[module] / scale - 1) > 1e-6]
    if not wrong:
        return None
    return f"it scales by lora_alpha / rank alone: wrong for {len(wrong)} of {len(ranks)} modules ({wrong[0]})"


def overriding_modules(facts: AdapterFacts) -> list[str]:
    """Return the modules whose rank or alpha is not the common one."""
    if facts.peft_type != "LORA":
        return []
    common = facts.config["r"], facts.config["lora_alpha"]
    return [
        module
        for module in facts.factors("A")
        if (module_rank(facts.config, module), module_alpha(facts.config, module)) != common
    ]


def note_pickle(facts: AdapterFacts) -> str | None:
    note = "the weights are a pickle (adapter_model.bin); their names and shapes were not checked"
    return note if facts.pickle else None


_MIXERS = (".linear_attn.", ".conv.", ".mamba.", ".mixer.", ".per_layer_input_gate", ".per_layer_projection")


def note_mixers(facts: AdapterFacts) -> str | None:
    """For an engine whose support of modules other than those of attention and MLP was not tested."""
    found = [module for module in facts.factors("A") if any(part in module for part in _MIXERS)]
    note = f"whether it applies an update of {found[0] if found else ''} was not tested: compare its answers"
    return note if found else None
