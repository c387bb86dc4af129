"""The engines, each with the rules that reject an adapter and those that only add a note.

PEFT: peft 0.21 (2026).
vLLM, main branch in September 2026: vllm/lora/peft_helper.py, lora_model.py and the choices of --max-lora-rank.
Releases with a `bias_enabled` in peft_helper.py read no rank_pattern and no alpha_pattern.
SGLang, main branch in September 2026: python/sglang/srt/lora; use_rslora is its issue #40835.
MLX, mlx-lm 0.32 (2026): mlx_lm/tuner/utils.py.
llama.cpp, main branch in 2026: convert_lora_to_gguf.py and src/llama-adapter.cpp.
Ollama, main branch in August 2026: convert/convert.go.
tunix 0.1.7 with qwix 0.1.8 (2026): tunix/sft/checkpoint_manager.py, qwix/_src/providers/lora.py.
"""

from collections.abc import Mapping

from jcrosslora.adapter.config import ALORA, DORA, KNOWN_TYPES, RANDOM_PISSA, is_alpha, is_variant
from jcrosslora.adapter.engines import rules
from jcrosslora.adapter.engines.rules import EngineFacts, Rule, found, no_tensor, no_value, when
from jcrosslora.adapter.folder import Form
from jcrosslora.adapter.gguf import INVOCATION, TYPE
from jcrosslora.adapter.jax_trainers import LORA_CONFIG, QWIX, trainer_of
from jcrosslora.adapter.names import (
    PREFIX,
    TensorName,
    ending,
    holds_all_experts,
    is_by_weight,
    is_of_experts,
    is_taken,
    module_rank,
)
from jcrosslora.architectures.blocks import LatentAttention
from jcrosslora.architectures.families import FAMILIES
from jcrosslora.checkpoint.gguf_header import ARCHITECTURES
from jcrosslora.checkpoint.gguf_tensors import architecture
from jcrosslora.checkpoint.tunix import TUNIX
from jcrosslora.checkpoint.wrapped import TEXT, text_module_name

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16  # default of vLLM's --max-lora-rank
# peft stores a copy of an embedding or head that is trained with LoRA; vLLM skips it.
_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_ALL = ("all-linear", "all")
_MIXERS = (".linear_attn.", ".conv.", ".mamba.", ".mixer.", ".per_layer_input_gate", ".per_layer_projection")
# Family -> part of the names of modules that its mlx_lm class lacks, because it splits the matrices of latent attention
# or renames modules.
_MLX_LACKS = {
    **dict.fromkeys(("deepseek_v3", "mistral4"), ".kv_b_proj."),
    **{"lfm2_moe": ".feed_forward.w", "nemotron_h": ".mixer."},
}
# Endings of modules, in PEFT and GGUF files, whose LoRA llama.cpp loads but does not apply, as runs of it show.
_LATENTS = (
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "attn_q_a.weight", "attn_q_b.weight", "attn_kv_a_mqa.weight"),
    *("fc1_latent_proj", "fc2_latent_proj", "ffn_latent_down.weight", "ffn_latent_up.weight"),
)
# Further ones in models with latent attention.
_QUERIES = ("q_proj", "attn_q.weight")
_OLLAMA_FAMILIES = ("llama", "gemma2")
_OLLAMA_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _variants_of_parameters(facts: EngineFacts) -> list[str]:
    named = facts.config.get("target_parameters")
    return [kind for kind in (DORA, ALORA) if named and is_variant(facts.config, kind)]


def _changing_init(facts: EngineFacts) -> list[str]:
    init = str(facts.config.get("init_lora_weights")).lower()
    return [init] if init.startswith(("pissa", "olora", "corda", "loftq")) else []


def _named_by_module(facts: EngineFacts) -> list[str]:
    lost = [name for name in facts.factors("A") if is_taken(facts.family, name) and not is_of_experts(name)]
    return [name for name in lost if not is_by_weight(facts.config, name)]


def _saved_modules(facts: EngineFacts) -> list[object]:
    saved = facts.config.get("modules_to_save") or []
    return [name for name in (saved if isinstance(saved, list) else [saved]) if name not in ("classifier", "score")]


def _largest_rank(facts: EngineFacts) -> int:
    # The tensor of all experts has (experts x rank) rows.
    ranks = [
        module_rank(facts.config, name) if holds_all_experts(name) else rank for name, rank in facts.ranks().items()
    ]
    if facts.pickle and facts.peft_type == "LORA":
        ranks = [int(facts.config["r"]), *map(int, (facts.config.get("rank_pattern") or {}).values())]
    return max(ranks, default=0)


def _rank_flag(facts: EngineFacts) -> str | None:
    rank = _largest_rank(facts)
    enough = next((size for size in VLLM_RANKS if size >= rank), None)
    return f"rank {rank} needs --max-lora-rank {enough}" if enough and rank > _DEFAULT_RANK else None


def _unlisted_targets(facts: EngineFacts) -> list[str]:
    stated = facts.config.get("target_modules")
    if not isinstance(stated, list):
        return []
    return sorted({ending(module) for module in facts.factors("A")} - {ending(str(name)) for name in stated})


def _whole_model(facts: EngineFacts) -> bool:
    return facts.config.get("fine_tune_type") == "full"


def _missing_parameters(facts: EngineFacts) -> list[str]:
    stated = facts.config.get("lora_parameters")
    missing = [key for key in ("rank", "scale") if key not in (stated if isinstance(stated, dict) else {})]
    return [" and ".join(missing)] if missing and not _whole_model(facts) else []


def _other_mlx_tensors(facts: EngineFacts) -> list[str]:
    known = (".lora_a", ".lora_b", ".m")
    return [key for key in facts.shapes if not key.endswith(known) and not _whole_model(facts)]


def _one_rank(facts: EngineFacts) -> str | None:
    if _missing_parameters(facts) or _whole_model(facts):
        return None
    rank, axes = facts.config["lora_parameters"]["rank"], {"lora_a": -1, "lora_b": 0}
    sided = [(key, shape, axes.get(key.rpartition(".")[2])) for key, shape in facts.shapes.items() if len(shape) == 2]
    other = [key for key, shape, axis in sided if axis is not None and shape[axis] != rank]
    return f"tensor {other[0]!r} is not of rank {str(rank)[:20]}, which the configuration states" if other else None


def _lacking_modules(facts: EngineFacts) -> list[str]:
    part = _MLX_LACKS.get(facts.family or "")
    return [key for key in facts.shapes if part is not None and part in key]


def _is_norm(tensor: TensorName) -> bool:
    return tensor.kind not in "AB" and "norm" in tensor.module


def _latents(facts: EngineFacts) -> list[str]:
    family = FAMILIES.get(facts.family or ARCHITECTURES.get(str(facts.config.get("general.architecture")), ""))
    ends = _LATENTS if family is None or LatentAttention not in family.blocks else (*_LATENTS, *_QUERIES)
    return [module for module in facts.factors("A") if module.endswith(ends)]


def _has_embedding(facts: EngineFacts) -> bool:
    return any(tensor.kind == "embedding" for tensor in facts.tensors)


def _no_tied_embedding(facts: EngineFacts) -> str | None:
    if facts.tied is False or not _has_embedding(facts):
        return None
    ends = "it aborts on the LoRA of an embedding that is the output head too"
    return ends if facts.tied else f"{ends}: check with --base whether this one is"


def _has_head(facts: EngineFacts) -> bool:
    return any(text_module_name(module) in ("lm_head", "output.weight") for module in facts.factors("A"))


def _same_architecture(facts: EngineFacts) -> str | None:
    arch, base = facts.config.get("general.architecture"), facts.base
    known = {architecture(facts.family or "", has) for has in ((False, True) if base is None else (base.has_experts,))}
    if None in known or arch in known:
        return None
    wanted = " or ".join(sorted(map(repr, known)))
    return f"the adapter is for bases of architecture {str(arch)[:60]!r}, this one is {wanted}"


# Files of these two kinds have tensors between lora_A and lora_B, which loaders silently ignore.
_BETWEEN = no_tensor(
    lambda tensor: tensor.kind in ("latent", "lora_gate"),
    "only LoRA-XS's or BeamLoRA's own repository reads tensor {0!r}",
)
_PICKLE = when(
    lambda it: it.pickle, "the weights are a pickle (adapter_model.bin); their names and shapes were not checked"
)
# For engines that were not tested with modules outside attention and MLP.
_MIXER = found(
    lambda it: [module for module in it.factors("A") if any(part in module for part in _MIXERS)],
    "whether it applies an update of {0} was not tested: compare its answers",
)
_HEAD = when(
    lambda it: it.tied is None and _has_head(it),
    "the LoRA of the output head is refused if the base ties that to its embedding",
)
_LLAMA_TENSORS = (
    no_tensor(_is_norm, "it loads the file without its trained norms ({0!r})"),
    found(_latents, "it loads the LoRA of {n} modules of latent attention and does not add it ({0})"),
    _no_tied_embedding,
    when(
        lambda it: it.tied is True and _has_head(it),
        "the LoRA of an output head that the base ties to its embedding is refused",
    ),
)
_GGUF = (
    no_value(TYPE, lambda stated: stated != "lora", f"{TYPE} is {{cut!r}}, it reads 'lora' alone"),
    rules.only_tensors("A", "B", "embedding", skipped=_is_norm),
    _same_architecture,
    rules.same_gguf_names,
    *_LLAMA_TENSORS,
)
_OLLAMA_BASES = " and ".join(_OLLAMA_FAMILIES)

_PEFT_RULES = (
    no_value("peft_type", lambda stated: str(stated or "").upper() not in KNOWN_TYPES, "peft_type {0!r} is not known"),
    found(
        lambda it: [key for key in it.shapes if not key.startswith("base_model.")],
        f"tensor names must start with {PREFIX!r}, {{0!r}} does not",
    ),
    _BETWEEN,
    when(
        lambda it: is_variant(it.config, RANDOM_PISSA),
        "it draws the random SVD of pissa_niter_N anew, and so changes the base in another way",
    ),
    found(
        _named_by_module,
        "it takes gate_proj, up_proj and down_proj in target_modules for experts, and loses the factors of {0} "
        "({n} such modules): write the adapter again with `jcrosslora export --base`",
    ),
    found(_variants_of_parameters, "it knows no {0} of target_parameters"),
    rules.same_names(),
)
_PEFT_NOTES = (
    _PICKLE,
    found(_changing_init, "init_lora_weights {0} changes the base weights when the adapter is loaded"),
)

_VLLM_RULES = (
    rules.only_plain_lora(),
    found(
        lambda it: [key for key in ("r", "lora_alpha", "target_modules") if it.config.get(key) in (None, "")],
        "the configuration lacks {all}",
    ),
    no_value("bias", lambda bias: bias and bias != "none", "bias {0!r} is not supported"),
    found(_saved_modules, "modules_to_save {all} is not supported"),
    rules.only_tensors("A", "B", "embedding", skipped=lambda tensor: tensor.key.endswith(_COPIES)),
    found(
        lambda it: [rank for rank in (_largest_rank(it),) if rank > VLLM_RANKS[-1]],
        f"rank {{0}} is above {VLLM_RANKS[-1]}, the largest it takes",
    ),
    rules.same_names(f"language_model.{TEXT}"),  # the name in its own class
)
_VLLM_NOTES = (
    _PICKLE,
    _rank_flag,
    when(rules.overriding_modules, "older releases read one scale for all modules and apply this one wrongly"),
    when(_has_embedding, "the LoRA of the embedding must have the base's vocabulary size"),
    _MIXER,
)

_SGLANG_RULES = (
    rules.only_plain_lora(),
    no_value(
        "target_modules",
        lambda targets: not isinstance(targets, list) and targets not in _ALL,
        "target_modules is {cut!r}, it takes a list of names: list their endings",
    ),
    _BETWEEN,
    when(rules.overriding_modules, "it refuses ranks or alphas that differ between modules"),
    when(
        lambda it: it.config.get("use_rslora") and it.config.get("r") != 1,
        "it ignores use_rslora: the update would be sqrt(r) too weak, without an error",
    ),
    rules.same_modules("and would not be applied"),  # it matches by layer number and ending
)
_SGLANG_NOTES = (
    _PICKLE,
    no_value(
        "target_modules",
        lambda targets: targets in _ALL,
        "older releases need --lora-target-modules with target_modules {0!r}",
    ),
    found(_unlisted_targets, "it needs --lora-target-modules with {all}, named by target_parameters"),
    rules.only_tensors("A", "B", "embedding", end="; whether it is read is not known"),
    _MIXER,
)

_MLX_RULES = (
    found(_missing_parameters, "lora_parameters of the configuration lacks {0}"),
    found(_other_mlx_tensors, "tensor {0!r} is not a lora_a or lora_b"),
    _one_rank,
    found(_lacking_modules, "its class has no module of the name of {0!r}, and it refuses the adapter"),
    rules.same_mlx_names,
)

_LLAMA_RULES = (
    rules.only_plain_lora(ALORA),
    rules.only_tensors("A", "B", "embedding", "copy", skipped=_is_norm),
    rules.alpha_over_rank,
    *_LLAMA_TENSORS,
    rules.same_modules("which its converter refuses"),
)
_CONVERT = "write it with `jcrosslora export --profile gguf`, or convert it with convert_lora_to_gguf.py"

_OLLAMA_RULES = (
    rules.only_plain_lora(),
    found(
        lambda it: [it.family] if it.family not in (None, *_OLLAMA_FAMILIES) else [],
        f"it takes adapters of {_OLLAMA_BASES} bases, this is for {{0}}",
    ),
    no_value(
        "lora_alpha",
        lambda alpha: not isinstance(alpha, int) or not 0 <= alpha < 2**32,
        "lora_alpha {0!r} is not a whole number of 32 bits",
    ),
    no_tensor(
        lambda tensor: tensor.kind not in "AB" or ending(tensor.module) not in _OLLAMA_ROLES,
        f"tensor {{0!r}} is not of {', '.join(_OLLAMA_ROLES)}",
    ),
    found(
        lambda it: [
            name
            for name, shape in it.factors("A").items()
            if len(shape) == 2 and shape[0] >= shape[1] and not holds_all_experts(name)
        ],
        "the rank of {0} is not below its width, so its tensors would be transposed",
    ),
    rules.alpha_over_rank,
)
_OLLAMA_NOTES = (
    _PICKLE,
    when(lambda it: it.family is None, f"only for {_OLLAMA_BASES} bases; the family of this base was not given"),
)
_ALWAYS_ACTIVE = when(
    lambda it: INVOCATION in it.config,
    "it does not know the invocation tokens (aLoRA): the adapter would always be active",
)
_OWN_ENGINE = "not for bases that its own engine runs, which knows no adapters (loras are not yet implemented)"

_TUNIX_RULES = (
    found(
        lambda it: [it.family] if it.family not in (None, *TUNIX) else [],
        f"it has no class for {{0}}, which is not one of {', '.join(TUNIX)}",
    ),
    found(
        lambda it: [name for name in it.shapes if trainer_of([name]) is not QWIX],
        "{0} is not a LoRA of qwix: write it with `jcrosslora export --profile tunix`",
    ),
    when(lambda it: not it.shapes, "it holds no LoRA"),
)
_TUNIX_NOTES = (
    when(
        lambda it: not is_alpha(it.config.get("alpha")),
        f"{LORA_CONFIG} does not say which alpha its LoraProvider had: the arrays do not either",
    ),
    when(lambda it: it.family is None, "only for the family it was trained on; that of this base was not given"),
)

Rules = tuple[Rule, ...]
# Engine -> format that it reads, the best first -> rules that reject an adapter, and rules that add a note.
ENGINES: Mapping[str, Mapping[Form, tuple[Rules, Rules]]] = {
    "PEFT": {"PEFT": (_PEFT_RULES, _PEFT_NOTES)},
    "vLLM": {"PEFT": (_VLLM_RULES, _VLLM_NOTES)},
    "SGLang": {"PEFT": (_SGLANG_RULES, _SGLANG_NOTES)},
    "llama.cpp": {"GGUF": (_GGUF, (_HEAD,)), "PEFT": (_LLAMA_RULES, (_PICKLE, lambda _: _CONVERT, _HEAD, _MIXER))},
    "MLX": {"MLX": (_MLX_RULES, (_MIXER,))},
    "Ollama": {"PEFT": (_OLLAMA_RULES, _OLLAMA_NOTES), "GGUF": ((*_GGUF, _ALWAYS_ACTIVE), (lambda _: _OWN_ENGINE,))},
    "tunix": {"Orbax": (_TUNIX_RULES, _TUNIX_NOTES)},
}
