"""Compare the names of an adapter's modules with those of its base.

An engine that finds no module of a name loads the adapter all the same, and it does nothing: vLLM without a word, peft
with a warning. This happens where an adapter of a text model is used on the multimodal class around it, or the other
way round.
"""

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.rules import Rule
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.wrapped import class_module_name, is_other_part, text_module_name


def same_names(*also: str) -> Rule:
    """Make the rule that every module must be one of the base, called as the base's class in transformers 5 calls it.

    Modules beside the text model are not judged. Without a base the rule holds.

    Args:
        also: further prefixes that the engine takes from a multimodal class.
    """

    def rule(facts: AdapterFacts) -> str | None:
        base = facts.base
        if base is None:
            return None
        prefixes = (base.prefix, *(also if base.wrapper is not None else ()))
        known = {class_module_name(name, prefix) for name in _modules(base) for prefix in prefixes}
        named = dict.fromkeys(tensor.module for tensor in facts.tensors if tensor.module)
        judged = [name for name in named if not is_other_part(name)]
        wrong = [name for name in judged if name not in known]
        return _sentence(wrong, len(judged), base) if wrong else None

    return rule


def _modules(base: BaseModel) -> set[str]:
    return {name.rpartition(".")[0] for name in base.tensor_names()} | {"lm_head"}


def _sentence(wrong: list[str], count: int, base: BaseModel) -> str:
    text = text_module_name(wrong[0])
    called = class_module_name(text, base.prefix) if text in _modules(base) else None
    what = f"{len(wrong)} of {count} modules are not in the base and would do nothing, without an error: {wrong[0]}"
    if called is None:
        return f"{what}, which the base does not have; give the base it was trained on"
    return f"{what}, which the base calls {called}; write it again with `jcrosslora export --base`"
