"""The kinds of adapter that are not a plain LoRA update of an unchanged base: refused by name, as a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

CONVERT = "convert it with peft first (peft.save_as_lora(path, model, rank)) and load the result"
RETRAIN = "no conversion exists; train a plain LoRA adapter instead"

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Refusal:
    """One kind that is refused.

    Attributes:
        kind: its name, as its users know it.
        applies: whether a configuration is of this kind.
        why: what makes it different from dW = scale B A.
        cure: what the user can do.
    """

    kind: str
    applies: Callable[[Config], bool]
    why: str
    cure: str


def _truthy(key: str) -> Callable[[Config], bool]:
    return lambda config: bool(config.get(key))


def _present(key: str) -> Callable[[Config], bool]:
    return lambda config: config.get(key) is not None


def _init_starts(prefix: str) -> Callable[[Config], bool]:
    return lambda config: str(config.get("init_lora_weights")).lower().startswith(prefix)


_MUTATES = "its training changed the base weights, so the factors alone are not the update"
_SAVE_CONVERTED = (
    "save it with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...) and load the result"
)

REFUSED: tuple[Refusal, ...] = (
    Refusal("DoRA (use_dora)", _truthy("use_dora"), "it rescales the rows of W + dW, a full-rank change", CONVERT),
    Refusal("PiSSA (init_lora_weights)", _init_starts("pissa"), _MUTATES, _SAVE_CONVERTED),
    Refusal("OLoRA (init_lora_weights)", _init_starts("olora"), _MUTATES, _SAVE_CONVERTED),
    Refusal("CorDA (init_lora_weights)", _init_starts("corda"), _MUTATES, _SAVE_CONVERTED),
    Refusal("LoftQ (init_lora_weights)", _init_starts("loftq"), _MUTATES, RETRAIN),
    Refusal(
        "aLoRA (alora_invocation_tokens)",
        _present("alora_invocation_tokens"),
        "it acts only after certain tokens of the source's tokenizer",
        RETRAIN,
    ),
    Refusal("QALoRA (use_qalora)", _truthy("use_qalora"), "its A reads pooled groups of inputs", RETRAIN),
    Refusal("BD-LoRA (use_bdlora)", _truthy("use_bdlora"), "its factors are block-diagonal", CONVERT),
    Refusal("KaSA (kasa_config)", _truthy("kasa_config"), "it truncates the base weights", RETRAIN),
    Refusal("Arrow (arrow_config)", _truthy("arrow_config"), "it routes between several adapters", RETRAIN),
    Refusal(
        "MonteCLoRA (monteclora_config)", _truthy("monteclora_config"), "its factors are random variables", RETRAIN
    ),
    Refusal(
        "LoRA of parameters (target_parameters)",
        _truthy("target_parameters"),
        "it updates three-dimensional expert weights",
        RETRAIN,
    ),
    Refusal(
        "LoRA with biases (lora_bias)",
        _truthy("lora_bias"),
        "its B adds a bias that no low-rank map carries",
        "train it with lora_bias=False",
    ),
    Refusal(
        "layer replication (layer_replication)",
        _truthy("layer_replication"),
        "its layer numbers are not those of the base",
        RETRAIN,
    ),
)

# Tensors that belong to a kind even where the configuration does not say so.
REFUSED_TENSORS: Mapping[str, str] = {
    "dora": f"DoRA: it rescales the rows of W + dW, a full-rank change; {CONVERT}",
    "kasa": f"KaSA: it truncates the base weights; {RETRAIN}",
    "adalora": f"AdaLoRA: its factors have singular values of their own; {CONVERT}",
    "lora_bias": "LoRA with biases (lora_bias); train it with lora_bias=False",
}

# Initialisations of peft 0.21 that leave the base weights alone.
PLAIN_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica", "lora_ga"})

# peft types without any update of a weight matrix, or with one that conversion cannot express.
_NO_UPDATE = frozenset(
    [
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "LN_TUNING",
        "XLORA",
        "POLY",
        "CARTRIDGE",
        "CPT",
        "TRAINABLE_TOKENS",
    ]
)


def peft_type_cure(peft_type: str) -> str:
    """What to do about an adapter whose `peft_type` is not LORA."""
    return RETRAIN if peft_type in _NO_UPDATE else f"where peft supports it, {CONVERT}"


# Every key of peft 0.21's LoraConfig, and those of its base class.
KNOWN_KEYS = frozenset(
    [
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    ]
)

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
