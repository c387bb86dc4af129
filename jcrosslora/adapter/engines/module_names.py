"""Compare the names of an adapter's modules with those of its base.

Most engines that find no module of a name load the adapter all the same, and it does nothing: vLLM and MLX without a
word, peft with a warning. This happens where an adapter of a text model is used on the multimodal class around it, or
the other way round, and where it is of another base.
"""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from collections.abc import Callable, Iterable

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.rules import Rule
from jcrosslora.adapter.expert_names import is_of_experts, is_router
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.gguf_metadata import ARCHITECTURES
from jcrosslora.checkpoint.gguf_names import hf_name
from jcrosslora.checkpoint.wrapped import TEXT, class_module_name, is_other_part, text_module_name

_SILENT = "and would do nothing, without an error"
_MLX_PREFIX = f"language_model.{TEXT}"
_EXPERTS = "_exps.weight"  # of a GGUF, which holds all experts of a layer in one tensor


def same_names(*also: str) -> Rule:
    """Make the rule that every module must be one of the base, called as the base's class in transformers 5 calls it.

    Modules beside the text model, and those of experts, are not judged. Without a base the rule holds.

    Args:
        also: further prefixes that the engine takes from a multimodal class.
    """

    def rule(facts: AdapterFacts) -> str | None:
        base = facts.base
        if base is None:
            return None
        prefixes = (base.prefix, *(also if base.wrapper is not None else ()))
        known = {class_module_name(name, prefix) for name in _modules(base) for prefix in prefixes}
        return _missing(_named(facts), known.__contains__, base, base.prefix, _SILENT)

    return rule


def same_modules(end: str) -> Rule:
    """Make the rule that every module must be one of the base, whatever stands in front of its layer.

    Args:
        end: of the sentence on modules that are not.
    """

    def rule(facts: AdapterFacts) -> str | None:
        if facts.base is None:
            return None
        known = _modules(facts.base)
        return _missing(_named(facts), lambda name: text_module_name(name) in known, facts.base, None, end)

    return rule


def same_mlx_names(facts: AdapterFacts) -> str | None:
    base = facts.base
    if base is None or facts.config.get("fine_tune_type") == "full":
        return None
    prefix = TEXT if base.wrapper is None else _MLX_PREFIX
    known = {class_module_name(name, prefix) for name in _modules(base)}
    named = dict.fromkeys(key.rpartition(".")[0] for key in facts.shapes)
    return _missing(named, known.__contains__, base, prefix, _SILENT, " --profile mlx")


def same_gguf_names(facts: AdapterFacts) -> str | None:
    base, arch = facts.base, facts.config.get("general.architecture")
    if base is None or arch not in ARCHITECTURES:
        return None
    known = _modules(base)

    def knows(tensor: str) -> bool:
        name = hf_name(tensor, arch)
        return name is not None and name.rpartition(".")[0] in known

    tensors = (tensor.module for tensor in facts.tensors if not tensor.module.endswith(_EXPERTS))
    return _missing(dict.fromkeys(tensors), knows, base, None, "which is refused")


def _named(facts: AdapterFacts) -> Iterable[str]:
    return dict.fromkeys(tensor.module for tensor in facts.tensors if tensor.module)


def _modules(base: BaseModel) -> set[str]:
    return {name.rpartition(".")[0] for name in base.tensor_names()} | {"lm_head"}


def _missing(
    named: Iterable[str],
    knows: Callable[[str], bool],
    base: BaseModel,
    prefix: str | None,
    end: str,
    options: str = "",
) -> str | None:
    """Say which modules an engine does not find.

    Args:
        named: the modules of the adapter.
        knows: whether the engine finds a module of a name.
        base: the base.
        prefix: of the base's modules in the engine, None if that does not matter.
        end: what comes of a module that is not found.
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
