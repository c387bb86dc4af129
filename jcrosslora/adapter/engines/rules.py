"""Rules for engines. A rule returns a sentence if an adapter breaks it, else None.

Some rules compare the names of an adapter's modules with those of its base: most engines that find no module of a name
load the adapter all the same, and it does nothing: vLLM and MLX without a word, peft with a warning. This happens if
an adapter of a text model is used on the multimodal class around it or vice versa, or if it is for another base.
"""

from collections.abc import Callable, Iterable
from typing import Any

from jcrosslora.adapter.config import VARIANTS
from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.names import TensorName, is_of_experts, is_router, module_alpha, module_rank
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.gguf_header import ARCHITECTURES
from jcrosslora.checkpoint.gguf_tensors import hf_name
from jcrosslora.checkpoint.wrapped import TEXT, class_module_name, is_other_part, text_module_name

Rule = Callable[[AdapterFacts], str | None]


def found(find: Callable[[AdapterFacts], Iterable[Any]], sentence: str) -> Rule:
    """Make a rule that nothing is found.

    In its sentence {0} is the first thing, {cut} its first 60 characters, {n} their number and {all} their list.
    """

    def rule(facts: AdapterFacts) -> str | None:
        things = list(find(facts))
        if not things:
            return None
        return sentence.format(things[0], cut=str(things[0])[:60], n=len(things), all=", ".join(map(str, things)))

    return rule


def no_tensor(is_bad: Callable[[TensorName], bool], sentence: str) -> Rule:
    """Make a rule that no tensor is bad; the sentence names tensors by their keys."""
    return found(lambda facts: [tensor.key for tensor in facts.tensors if is_bad(tensor)], sentence)


def no_value(key: str, is_bad: Callable[[Any], Any], sentence: str) -> Rule:
    """Make a rule that the value for a key of the configuration is not bad."""
    return found(lambda facts: [value for value in (facts.config.get(key),) if is_bad(value)], sentence)


def when(holds: Callable[[AdapterFacts], Any], sentence: str) -> Rule:
    """Make a rule that a condition does not hold."""
    return lambda facts: sentence if holds(facts) else None


def only_plain_lora(*supported: str) -> Rule:
    """Make the rule for an engine that reads LoRA, in no variant but these, keys of `VARIANTS`."""

    def rule(facts: AdapterFacts) -> str | None:
        if facts.peft_type != "LORA":
            return f"it reads only LoRA, this is {facts.peft_type or 'of no type'}"
        kinds = [kind for kind, one in VARIANTS.items() if one.applies(facts.config) and kind not in supported]
        return f"it reads only plain LoRA, this is {', '.join(kinds)}" if kinds else None

    return rule


def only_tensors(*kinds: str, skipped: Callable[[TensorName], bool] = lambda _: False, end: str = "") -> Rule:
    """Make the rule for an engine that refuses all tensors but those of these kinds, and those that it skips."""
    sentence = "tensor {0!r} is not one of a LoRA ({n} such tensors)" + end
    return no_tensor(lambda tensor: tensor.kind not in kinds and not skipped(tensor), sentence)


def alpha_over_rank(facts: AdapterFacts) -> str | None:
    """Judge for an engine that reads one alpha and takes the rank from the tensor."""
    if facts.peft_type != "LORA":
        return None
    alpha, ranks = facts.config["lora_alpha"], facts.ranks()
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


_SILENT = "and would do nothing, without an error"


def same_names(*also: str) -> Rule:
    """Make the rule that every module has a name that the base's class gives to one in transformers 5.

    `also` are further prefixes that the engine takes from a multimodal class.
    """

    def rule(facts: AdapterFacts) -> str | None:
        base = facts.base
        if base is None:
            return None
        known = _class_names(base, base.prefix, *(also if base.wrapper is not None else ()))
        return _missing(facts, base, known.__contains__, _SILENT, base.prefix)

    return rule


def same_modules(end: str) -> Rule:
    """Make the rule that every module is one of the base, whatever stands in front of its layer."""

    def rule(facts: AdapterFacts) -> str | None:
        if facts.base is None:
            return None
        known = _modules(facts.base)
        return _missing(facts, facts.base, lambda name: text_module_name(name) in known, end)

    return rule


def same_mlx_names(facts: AdapterFacts) -> str | None:
    """Judge the names in a file of MLX, as `same_names` those in a file of PEFT."""
    base = facts.base
    if base is None or facts.config.get("fine_tune_type") == "full":
        return None
    prefix = TEXT if base.wrapper is None else f"language_model.{TEXT}"
    return _missing(facts, base, _class_names(base, prefix).__contains__, _SILENT, prefix)


def same_gguf_names(facts: AdapterFacts) -> str | None:
    """Judge the names in a GGUF."""
    base, arch = facts.base, facts.config.get("general.architecture")
    if base is None or arch not in ARCHITECTURES:
        return None
    known = _modules(base)

    def knows(tensor: str) -> bool:
        name = hf_name(tensor, arch)
        return name is not None and name.rpartition(".")[0] in known

    return _missing(facts, base, knows, "which is refused")


def _modules(base: BaseModel) -> set[str]:
    return {name.rpartition(".")[0] for name in base.store.names()} | {"lm_head"}


def _class_names(base: BaseModel, *prefixes: str) -> set[str]:
    return {class_module_name(name, prefix) for name in _modules(base) for prefix in prefixes}


def _judged(facts: AdapterFacts, base: BaseModel) -> list[str]:
    """Return the modules that a file names, without those outside the text model and of experts."""
    named = (key.rpartition(".")[0] for key in facts.shapes)
    if facts.form != "MLX":
        named = (tensor.module for tensor in facts.tensors)
    judged = [name for name in dict.fromkeys(named) if name and not is_other_part(name)]
    # In a GGUF one tensor holds all experts of a layer.
    judged = [name for name in judged if facts.form != "GGUF" or not name.endswith("_exps.weight")]
    return [name for name in judged if not (base.has_experts and (is_of_experts(name) or is_router(name)))]


def _missing(
    facts: AdapterFacts, base: BaseModel, knows: Callable[[str], bool], end: str, prefix: str | None = None
) -> str | None:
    """Say which modules of a file an engine does not find by the names it knows, and what follows from that (`end`).

    `prefix` is that of the base's modules in the engine, None if that does not matter.
    """
    judged = _judged(facts, base)
    wrong = [name for name in judged if not knows(name)]
    if not wrong:
        return None
    text = text_module_name(wrong[0])
    what = f"{len(wrong)} of {len(judged)} modules are not in the base {end}: {wrong[0]}"
    if prefix is None or text not in _modules(base):
        return f"{what}, which the base does not have; give the base it was trained on"
    called, options = class_module_name(text, prefix), " --profile mlx" if facts.form == "MLX" else ""
    return f"{what}, which the base calls {called}; write it again with `jcrosslora export{options} --base`"
