"""Tables of configuration keys, of variants of LoRA, and of refused kinds.

Keys: all that peft 0.21 writes for the kinds that are read; other keys are reported by name. Variants: settings that
make a configuration of type LORA more than dW = scale B A on an unchanged base. Refused kinds cannot be read as an
update of weight matrices.
"""

from collections.abc import Callable, Mapping
from typing import Any

_LORA = frozenset(
    [
        *(
            "alora_invocation_tokens",
            "alpha_pattern",
            "arrow_config",
            "auto_mapping",
            "base_model_name_or_path",
            "bias",
        ),
        *("corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
        *("init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config"),
        *("megatron_core", "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size"),
        *("r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type"),
        *("trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config"),
    ]
)
_OTHERS = frozenset(
    [
        *("beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"),
        *("d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"),
        *("init_logits_std", "init_vector_bank_bound", "num_vectors", "save_only_topk_weights", "topk"),
        *("vblora_dropout", "vector_length"),
        *("alpha", "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"),
        *("decompose_both", "decompose_factor"),
        *("init_theta_d_bound", "proj_seed", "save_indices", "theta_d_length", "unilora_dropout"),
        *("use_beamlora",),
    ]
)
KNOWN_KEYS = _LORA | _OTHERS


Config = Mapping[str, Any]


def _truthy(key: str) -> Callable[[Config], bool]:
    return lambda config: bool(config.get(key))


def _present(key: str) -> Callable[[Config], bool]:
    return lambda config: config.get(key) is not None


def _init_starts(prefix: str) -> Callable[[Config], bool]:
    return lambda config: str(config.get("init_lora_weights")).lower().startswith(prefix)


def _init_is(name: str) -> Callable[[Config], bool]:
    return lambda config: str(config.get("init_lora_weights")).lower() == name


DORA = "DoRA (use_dora)"
PISSA = "PiSSA (init_lora_weights)"
RANDOM_PISSA = "PiSSA of a random SVD (init_lora_weights pissa_niter_N)"
OLORA = "OLoRA (init_lora_weights)"
CORDA = "CorDA (init_lora_weights)"
LOFTQ = "LoftQ (init_lora_weights)"
ALORA = "aLoRA (alora_invocation_tokens)"
QALORA = "QALoRA (use_qalora)"
BDLORA = "BD-LoRA (use_bdlora)"
KASA = "KaSA (kasa_config)"
ARROW = "Arrow (arrow_config)"
MONTECLORA = "MonteCLoRA (monteclora_config)"
PARAMETERS = "LoRA of parameters (target_parameters)"
OTHER_PARAMETERS = "LoRA of parameters that are neither experts' nor weights of modules (target_parameters)"
BIASES = "LoRA with biases (lora_bias)"
REPLICATION = "layer replication (layer_replication)"
BEAM = "BeamLoRA (use_beamlora)"

_READ_PARAMETERS = (".gate_up_proj", ".experts.up_proj", ".down_proj", ".weight")
_ROUTERS = (".gate.weight", ".router.weight")


def _parameters(config: Config) -> list[str]:
    named = config.get("target_parameters") or []
    return [f".{name}" for name in named] if isinstance(named, list) else [""]


def _of_parameters(config: Config) -> bool:
    """Whether it is more than a LoRA of linear modules, whose weights may be named in their place."""
    return any(not name.endswith(".weight") or name.endswith(_ROUTERS) for name in _parameters(config))


def _of_other_parameters(config: Config) -> bool:
    return not all(name.endswith(_READ_PARAMETERS) for name in _parameters(config))


# Name, as its users know it -> whether it applies to a configuration.
VARIANTS: Mapping[str, Callable[[Config], bool]] = {
    DORA: _truthy("use_dora"),
    PISSA: _init_is("pissa"),
    RANDOM_PISSA: _init_starts("pissa_niter_"),
    OLORA: _init_starts("olora"),
    CORDA: _init_starts("corda"),
    LOFTQ: _init_starts("loftq"),
    ALORA: _present("alora_invocation_tokens"),
    QALORA: _truthy("use_qalora"),
    BDLORA: _truthy("use_bdlora"),
    KASA: _truthy("kasa_config"),
    ARROW: _truthy("arrow_config"),
    MONTECLORA: _truthy("monteclora_config"),
    PARAMETERS: _of_parameters,
    OTHER_PARAMETERS: _of_other_parameters,
    BIASES: _truthy("lora_bias"),
    REPLICATION: _truthy("layer_replication"),
    BEAM: _truthy("use_beamlora"),
}


_CONVERT = "convert it with peft first (peft.save_as_lora(path, model, rank)) and load the result"
_MERGE = (
    "peft has no conversion to LoRA for it, so it cannot be moved: use it on its own base, or merged into that "
    "(merge_and_unload() of peft), or train a plain LoRA adapter instead"
)
_RETRAIN = "no conversion exists; train a plain LoRA adapter instead"

_MUTATES = "its training changed the base weights, and the change is not in the adapter"
_SAVE_CONVERTED = (
    "load what peft's save_pretrained(..., path_initial_model_for_weight_conversion=...) saves, which needs the "
    "adapter as it was before training; without that one, train anew"
)

# Variant of LORA -> why it is not dW = scale B A, and what the user can do.
REFUSED: Mapping[str, tuple[str, str]] = {
    RANDOM_PISSA: (f"{_MUTATES}: peft draws another random SVD on each load", _SAVE_CONVERTED),
    CORDA: (_MUTATES, _SAVE_CONVERTED),
    LOFTQ: (_MUTATES, _RETRAIN),
    QALORA: ("its A reads pooled groups of inputs", _RETRAIN),
    BDLORA: ("its factors are block-diagonal", _MERGE),
    KASA: ("it truncates the base weights", _RETRAIN),
    ARROW: ("it routes between several adapters", _RETRAIN),
    MONTECLORA: ("its factors are random variables", _RETRAIN),
    OTHER_PARAMETERS: ("it updates parameters that are neither experts' nor weights of modules", _RETRAIN),
    REPLICATION: ("its layer numbers are not those of the base", _RETRAIN),
}

# Tensors that identify a refused kind whatever the configuration says.
REFUSED_TENSORS: Mapping[str, str] = {
    "kasa": f"KaSA: it truncates the base weights; {_RETRAIN}",
}

# Initialisations of peft 0.21 that do not change the base weights.
PLAIN_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica", "lora_ga"})

_TOKENS = "it adds trained vectors to the model's input and changes no weight matrix"
_ROTATES = "it rotates weight matrices, a change of full rank"
_ROUTES = "it routes between several adapters"
_FORM = "its update is not stored as two factors"

# peft type -> why its update cannot be read, and what the user can do; what peft 0.21 converts was tried.
_REFUSED_TYPES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), (_TOKENS, _RETRAIN)),
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE", "CPT"), (_TOKENS, _RETRAIN)),
    "LN_TUNING": ("it changes norms alone", _RETRAIN),
    "BEFT": ("it changes biases alone", _RETRAIN),
    "TRAINABLE_TOKENS": ("it changes rows of the embedding alone", _RETRAIN),
    **dict.fromkeys(("LILY", "POLY", "XLORA"), (_ROUTES, _RETRAIN)),
    "SHADOW": ("its change of the weights depends on the input", _RETRAIN),
    "IA3": ("it rescales activations, a change of full rank", _MERGE),
    "HIRA": ("it multiplies the weights entry by entry, a change of full rank", _MERGE),
    **dict.fromkeys(("BOFT", "HRA", "OFT", "ROAD"), (_ROTATES, _MERGE)),
    **dict.fromkeys(("ADAMSS", "DEFT", "FROD", "GLORA", "OSF", "PEANUT", "PVERA", "SHIRA"), (_FORM, _MERGE)),
    "SUPERTUNING": (_FORM, _MERGE),
    "PSOFT": (_ROTATES, _CONVERT),
    "FOURIERFT": ("its frequencies are drawn by torch", _CONVERT),
    **dict.fromkeys(("C3A", "DELORA", "GRALORA", "MISS", "RANDLORA", "TINYLORA", "WAVEFT"), (_FORM, _CONVERT)),
}


def why_refused(peft_type: str) -> str:
    """Say why an adapter of a `peft_type`, in capitals, is not read, and what to do about it."""
    why, cure = _REFUSED_TYPES.get(peft_type, ("it is not known", f"if peft knows it, {_CONVERT}"))
    return f"{why}; {cure}"


# Every peft_type of peft 0.21.
KNOWN_TYPES = frozenset(
    [
        *("ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA"),
        *("FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA"),
        *("MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING"),
        *("PSOFT", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA"),
        *("TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA"),
    ]
)
