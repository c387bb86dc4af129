"""Facts about an adapter, from its configuration and the names and shapes of its tensors, and rules on these facts.

A rule returns a sentence if an adapter breaks it, else None. Some rules compare the names of an adapter's modules with
those of its base. Most engines ignore modules that they do not find, vLLM and MLX silently, peft with a warning, and
then the adapter does nothing. This happens if the adapter is for another base, or if an adapter of a text model is used
on a multimodal class that wraps it, or vice versa.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jcrosslora.adapter.config import PARAMETERS, VARIANTS, check_numbers, is_variant
from jcrosslora.adapter.folder import CONFIG, PICKLE, WEIGHTS, Form, find_adapter, form_of, open_weights, read_config
from jcrosslora.adapter.gguf import open_gguf_adapter, parse_gguf_name
from jcrosslora.adapter.names import (
    TensorName,
    is_of_experts,
    is_router,
    module_alpha,
    module_rank,
    module_scale,
    parse_tensor_name,
)
from jcrosslora.adapter.orbax import checkpoint_shapes
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.gguf_header import ARCHITECTURES
from jcrosslora.checkpoint.gguf_tensors import hf_name
from jcrosslora.checkpoint.wrapped import TEXT, class_module_name, is_other_part, text_module_name
from jcrosslora.errors import AdapterError

_SILENT = "and would do nothing, without an error"


@dataclass(frozen=True)
class EngineFacts:
    """An adapter as the engine rules see it.

    Attributes:
        config: its `adapter_config.json` or `lora_config.json`, or the metadata of a GGUF file.
        shapes: tensor name to shape; empty if the weights are a pickle.
        tensors: the same names, parsed; empty for MLX and Orbax.
        pickle: whether the weights are `adapter_model.bin`.
        family: the base's family ("llama", "qwen2", ...), None if it is not known.
        tied: whether the base's output head is its embedding, None if it is not known.
        base: the base that it is for, if given.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: tuple[TensorName, ...] = ()
    pickle: bool = False
    form: Form = "PEFT"
    family: str | None = None
    tied: bool | None = None
    base: BaseModel | None = None

    @property
    def peft_type(self) -> str:
        """The type in capitals, "" if there is none."""
        return str(self.config.get("peft_type") or "").upper()

    def factors(self, side: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the A or B of each module; the first number of A is the rank."""
        return {tensor.module: self.shapes[tensor.key] for tensor in self.tensors if tensor.kind == side}

    def ranks(self) -> dict[str, int]:
        """Return the rank of each module."""
        return {module: shape[0] for module, shape in self.factors("A").items()}

    def scales(self) -> dict[str, float]:
        """Return the scale that PEFT gives to each module; only defined without faults."""
        return {module: module_scale(self.config, module, rank) for module, rank in self.ranks().items()}

    @cached_property
    def fault(self) -> str | None:
        """Why no engine can use it: an error in the configuration's numbers or the shapes, or no tensor; else None."""
        if not self.shapes and not self.pickle:
            return "it holds no tensor, so it does nothing: write it again from its training"
        try:
            if self.form == "PEFT" and self.peft_type == "LORA":
                check_numbers(self.config, CONFIG)
        except AdapterError as error:
            return str(error)
        return _tensor_fault(self) if self.form in ("PEFT", "GGUF") else None


Rule = Callable[[EngineFacts], str | None]


def read_facts(
    ref: str | Path, family: str | None = None, tied: bool | None = None, base: BaseModel | None = None
) -> EngineFacts:
    """Read the facts of an adapter, local or on the hub; `base`, if given, overrides `family` and `tied`.

    Raises AdapterError if it is no adapter, or a file of it cannot be read.
    """
    known: dict[str, Any] = {"family": family, "tied": tied}
    if base is not None:
        known = {"family": base.family.name, "tied": base.tied, "base": base}
    path = Path(ref)
    if (path / PICKLE).is_file() and (path / CONFIG).is_file() and not (path / WEIGHTS).is_file():
        config = read_config(path / CONFIG)
        if form_of(config) == "PEFT":
            return EngineFacts(config, pickle=True, **known)
    files = find_adapter(ref)
    if files.form == "Orbax":
        config = {} if files.config is None else read_config(files.config)
        return EngineFacts(config, checkpoint_shapes(files.weights), form="Orbax", **known)
    if files.config is None:
        header = open_gguf_adapter(files.weights).header
        shapes = {name: info.shape for name, info in header.tensors.items()}
        return EngineFacts(header.metadata, shapes, tuple(map(parse_gguf_name, shapes)), form="GGUF", **known)
    config = read_config(files.config)
    shapes = {key: entry.shape for key, entry in open_weights(files.weights).entries.items()}
    if files.form == "MLX":
        return EngineFacts(config, shapes, form="MLX", **known)
    return EngineFacts(config, shapes, tuple(map(parse_tensor_name, shapes)), **known)


def _tensor_fault(facts: EngineFacts) -> str | None:
    # The factors of expert parameters hold all experts at once, with further axes.
    of_peft = facts.form == "PEFT"
    if of_peft and (facts.peft_type != "LORA" or is_variant(facts.config, PARAMETERS)):
        return None
    a, b = facts.factors("A"), facts.factors("B")
    if alone := sorted(a.keys() ^ b.keys()):
        return f"{alone[0]} has only one of lora_A and lora_B ({len(alone)} such modules)"
    if differ := sorted(module for module in a if not _is_pair(a[module], b[module])):
        return f"lora_A and lora_B of {differ[0]} have different ranks ({len(differ)} such modules)"
    ranks = facts.ranks() if of_peft else {}
    if wrong := sorted(module for module, rank in ranks.items() if rank != module_rank(facts.config, module)):
        rank, wanted = ranks[wrong[0]], module_rank(facts.config, wrong[0])
        return f"{wrong[0]} has rank {rank}, {CONFIG} says {wanted} ({len(wrong)} such modules)"
    return None


def _is_pair(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) >= 2 and len(a) == len(b) and a[0] == b[1] and a[0] > 0


def found(find: Callable[[EngineFacts], Iterable[Any]], sentence: str) -> Rule:
    """Make a rule that is broken if `find` returns anything.

    In the sentence {0} is the first item, {cut} its first 60 characters, {n} the number of items, {all} their list.
    """

    def rule(facts: EngineFacts) -> str | None:
        things = list(find(facts))
        if not things:
            return None
        return sentence.format(things[0], cut=str(things[0])[:60], n=len(things), all=", ".join(map(str, things)))

    return rule


def no_tensor(is_bad: Callable[[TensorName], bool], sentence: str) -> Rule:
    """Make a rule that is broken if any tensor is bad; the items in the sentence are tensor keys."""
    return found(lambda facts: [tensor.key for tensor in facts.tensors if is_bad(tensor)], sentence)


def no_value(key: str, is_bad: Callable[[Any], Any], sentence: str) -> Rule:
    """Make a rule that is broken if the configuration's value for `key` is bad."""
    return found(lambda facts: [value for value in (facts.config.get(key),) if is_bad(value)], sentence)


def when(holds: Callable[[EngineFacts], Any], sentence: str) -> Rule:
    """Make a rule that is broken if a condition holds."""
    return lambda facts: sentence if holds(facts) else None


def only_plain_lora(*supported: str) -> Rule:
    """Make the rule for an engine that reads plain LoRA and the `supported` variants, keys of `VARIANTS`."""

    def rule(facts: EngineFacts) -> str | None:
        if facts.peft_type != "LORA":
            return f"it reads only LoRA, this is {facts.peft_type or 'of no type'}"
        kinds = [kind for kind, one in VARIANTS.items() if one.applies(facts.config) and kind not in supported]
        return f"it reads only plain LoRA, this is {', '.join(kinds)}" if kinds else None

    return rule


def only_tensors(*kinds: str, skipped: Callable[[TensorName], bool] = lambda _: False, end: str = "") -> Rule:
    """Make the rule for an engine that refuses tensors of any other kind, unless it skips them."""
    sentence = "tensor {0!r} is not one of a LoRA ({n} such tensors)" + end
    return no_tensor(lambda tensor: tensor.kind not in kinds and not skipped(tensor), sentence)


def alpha_over_rank(facts: EngineFacts) -> str | None:
    """Check the scales for an engine that reads one alpha and takes ranks from the tensors."""
    if facts.peft_type != "LORA":
        return None
    alpha, ranks = facts.config["lora_alpha"], facts.ranks()
    wrong = [module for module, scale in facts.scales().items() if abs(alpha / ranks[module] / scale - 1) > 1e-6]
    if not wrong:
        return None
    return f"it scales by lora_alpha / rank alone: wrong for {len(wrong)} of {len(ranks)} modules ({wrong[0]})"


def overriding_modules(facts: EngineFacts) -> list[str]:
    """Return the modules whose rank or alpha differs from `r` or `lora_alpha`."""
    config = facts.config
    if facts.peft_type != "LORA":
        return []
    common = config["r"], config["lora_alpha"]
    return [name for name in facts.factors("A") if (module_rank(config, name), module_alpha(config, name)) != common]


def same_names(*also: str) -> Rule:
    """Make the rule that every module is named as in the base's class of transformers 5.

    `also` are further prefixes that the engine accepts for a multimodal class.
    """

    def rule(facts: EngineFacts) -> str | None:
        base = facts.base
        if base is None:
            return None
        known = _class_names(base, base.prefix, *(also if base.wrapper is not None else ()))
        return _missing(facts, base, known.__contains__, _SILENT, base.prefix)

    return rule


def same_modules(end: str) -> Rule:
    """Make the rule that every module exists in the base, whatever the prefix before its layer."""

    def rule(facts: EngineFacts) -> str | None:
        if facts.base is None:
            return None
        known = _modules(facts.base)
        return _missing(facts, facts.base, lambda name: text_module_name(name) in known, end)

    return rule


def same_mlx_names(facts: EngineFacts) -> str | None:
    """Check the names in an MLX file, as `same_names` does for PEFT."""
    base = facts.base
    if base is None or facts.config.get("fine_tune_type") == "full":
        return None
    prefix = TEXT if base.wrapper is None else f"language_model.{TEXT}"
    return _missing(facts, base, _class_names(base, prefix).__contains__, _SILENT, prefix)


def same_gguf_names(facts: EngineFacts) -> str | None:
    """Check the names in a GGUF file."""
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


def _judged(facts: EngineFacts, base: BaseModel) -> list[str]:
    """Return the modules whose names are checked: not those outside the text model, nor experts and routers.

    With `layer_replication` no name is checked, because it renumbers the layers.
    """
    if facts.config.get("layer_replication"):
        return []
    named = (key.rpartition(".")[0] for key in facts.shapes)
    if facts.form != "MLX":
        named = (tensor.module for tensor in facts.tensors)
    judged = [name for name in dict.fromkeys(named) if name and not is_other_part(name)]
    # In a GGUF one tensor holds all experts of a layer.
    judged = [name for name in judged if facts.form != "GGUF" or not name.endswith("_exps.weight")]
    return [name for name in judged if not (base.has_experts and (is_of_experts(name) or is_router(name)))]


def _missing(
    facts: EngineFacts, base: BaseModel, knows: Callable[[str], bool], end: str, prefix: str | None = None
) -> str | None:
    """Return a sentence on the modules that an engine does not find and the consequence (`end`); None if it finds all.

    `prefix` is the prefix of the base's modules in the engine, None if prefixes do not matter.
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
