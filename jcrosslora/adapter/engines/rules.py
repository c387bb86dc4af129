"""Rules that several engines share. A rule returns a sentence if an adapter breaks it, else None.

Some rules compare the names of an adapter's modules with those of its base: most engines that find no module of a name
load the adapter all the same, and it does nothing: vLLM and MLX without a word, peft with a warning. This happens if
an adapter of a text model is used on the multimodal class around it or vice versa, or if it is for another base.
"""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jcrosslora.adapter.config import VARIANTS
from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.folder import Form
from jcrosslora.adapter.names import TensorName, is_of_experts, is_router
from jcrosslora.adapter.patterns import module_alpha, module_rank
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.gguf_header import ARCHITECTURES
from jcrosslora.checkpoint.gguf_tensors import hf_name
from jcrosslora.checkpoint.wrapped import TEXT, class_module_name, is_other_part, text_module_name

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
        kinds = [kind for kind, one in VARIANTS.items() if one.applies(facts.config) and kind not in supported]
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
    config = facts.config
    if facts.peft_type != "LORA":
        return []
    common = config["r"], config["lora_alpha"]
    return [name for name in facts.factors("A") if (module_rank(config, name), module_alpha(config, name)) != common]


def note_pickle(facts: AdapterFacts) -> str | None:
    note = "the weights are a pickle (adapter_model.bin); their names and shapes were not checked"
    return note if facts.pickle else None


_MIXERS = (".linear_attn.", ".conv.", ".mamba.", ".mixer.", ".per_layer_input_gate", ".per_layer_projection")


def note_mixers(facts: AdapterFacts) -> str | None:
    """For an engine whose support of modules other than those of attention and MLP was not tested."""
    found = [module for module in facts.factors("A") if any(part in module for part in _MIXERS)]
    return f"whether it applies an update of {found[0]} was not tested: compare its answers" if found else None


_SILENT = "and would do nothing, without an error"
_MLX_PREFIX = f"language_model.{TEXT}"
_EXPERTS = "_exps.weight"  # of a GGUF, which holds all experts of a layer in one tensor


def same_names(*also: str) -> Rule:
    """Make the rule that every module has a name that the base's class gives to one in transformers 5.

    Modules outside the text model, and those of experts, are not judged. Without a base the rule holds.

    Args:
        also: further prefixes that the engine takes from a multimodal class.
    """

    def rule(facts: AdapterFacts) -> str | None:
        base = facts.base
        if base is None:
            return None
        prefixes = (base.prefix, *(also if base.wrapper is not None else ()))
        known = {class_module_name(name, prefix) for name in _modules(base) for prefix in prefixes}
        return _missing(_named(facts), known.__contains__, base, _SILENT, base.prefix)

    return rule


def same_modules(end: str) -> Rule:
    """Make the rule that every module is one of the base, whatever stands in front of its layer.

    Args:
        end: of the sentence on modules that are not.
    """

    def rule(facts: AdapterFacts) -> str | None:
        if facts.base is None:
            return None
        known = _modules(facts.base)
        return _missing(_named(facts), lambda name: text_module_name(name) in known, facts.base, end)

    return rule


def same_mlx_names(facts: AdapterFacts) -> str | None:
    base = facts.base
    if base is None or facts.config.get("fine_tune_type") == "full":
        return None
    prefix = TEXT if base.wrapper is None else _MLX_PREFIX
    known = {class_module_name(name, prefix) for name in _modules(base)}
    named = dict.fromkeys(key.rpartition(".")[0] for key in facts.shapes)
    return _missing(named, known.__contains__, base, _SILENT, prefix, options=" --profile mlx")


def same_gguf_names(facts: AdapterFacts) -> str | None:
    base, arch = facts.base, facts.config.get("general.architecture")
    if base is None or arch not in ARCHITECTURES:
        return None
    known = _modules(base)

    def knows(tensor: str) -> bool:
        name = hf_name(tensor, arch)
        return name is not None and name.rpartition(".")[0] in known

    tensors = (tensor.module for tensor in facts.tensors if not tensor.module.endswith(_EXPERTS))
    return _missing(dict.fromkeys(tensors), knows, base, "which is refused")


def _named(facts: AdapterFacts) -> Iterable[str]:
    return dict.fromkeys(tensor.module for tensor in facts.tensors if tensor.module)


def _modules(base: BaseModel) -> set[str]:
    return {name.rpartition(".")[0] for name in base.store.names()} | {"lm_head"}


def _missing(
    named: Iterable[str],
    knows: Callable[[str], bool],
    base: BaseModel,
    end: str,
    prefix: str | None = None,
    *,
    options: str = "",
) -> str | None:
    """Say which modules an engine does not find.

    Args:
        named: the modules of the adapter.
        knows: whether the engine finds a module of a name.
        base: the model that the adapter is for.
        end: what follows from a module that is not found.
        prefix: of the base's modules in the engine, None if that does not matter.
        options: of the command that writes the adapter again.
    """
    judged = [name for name in named if not is_other_part(name)]
    judged = [name for name in judged if not (base.has_experts and (is_of_experts(name) or is_router(name)))]
    wrong = [name for name in judged if not knows(name)]
    if not wrong:
        return None
    text = text_module_name(wrong[0])
    what = f"{len(wrong)} of {len(judged)} modules are not in the base {end}: {wrong[0]}"
    if prefix is None or text not in _modules(base):
        return f"{what}, which the base does not have; give the base it was trained on"
    called = class_module_name(text, prefix)
    return f"{what}, which the base calls {called}; write it again with `jcrosslora export{options} --base`"
