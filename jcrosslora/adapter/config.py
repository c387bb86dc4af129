"""Check an `adapter_config.json`: its keys, its kind of adapter, and the range of its numbers."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jcrosslora.adapter.names import is_matchable
from jcrosslora.errors import AdapterError

Config = Mapping[str, Any]

# The keys that peft 0.21 writes for the kinds that are read; others are reported by name.
_KNOWN_KEYS = {
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias"),
    *("corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config"),
    *("megatron_core", "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size"),
    *("r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type"),
    *("trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config"),
    *("beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"),
    *("d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout", "use_beamlora"),
    *("init_logits_std", "init_vector_bank_bound", "num_vectors", "save_only_topk_weights", "topk"),
    *("vblora_dropout", "vector_length", "decompose_both", "decompose_factor"),
    *("alpha", "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"),
    *("init_theta_d_bound", "proj_seed", "save_indices", "theta_d_length", "unilora_dropout"),
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


class Variant(NamedTuple):
    """A variant of LoRA beyond dW = s B A on an unchanged base; `refusal`: why it is refused, and what to do."""

    applies: Callable[[Config], bool]
    refusal: tuple[str, str] | None = None


def _set(key: str) -> Callable[[Config], bool]:
    return lambda config: bool(config.get(key))


def _init(config: Config) -> str:
    return str(config.get("init_lora_weights")).lower()


def _parameters(config: Config) -> list[str]:
    named = config.get("target_parameters") or []
    return [f".{name}" for name in named] if isinstance(named, list) else [""]


_READ_PARAMETERS = (".gate_up_proj", ".experts.up_proj", ".down_proj", ".weight")
_ROUTERS = (".gate.weight", ".router.weight")


def _of_parameters(config: Config) -> bool:
    """Return whether `target_parameters` names anything but weights of linear modules, such as experts or routers."""
    return any(not name.endswith(".weight") or name.endswith(_ROUTERS) for name in _parameters(config))


DORA = "DoRA (use_dora)"
PISSA = "PiSSA (init_lora_weights)"
RANDOM_PISSA = "PiSSA of a random SVD (init_lora_weights pissa_niter_N)"
OLORA = "OLoRA (init_lora_weights)"
ALORA = "aLoRA (alora_invocation_tokens)"
PARAMETERS = "LoRA of parameters (target_parameters)"
BEAM = "BeamLoRA (use_beamlora)"
VARIANTS: Mapping[str, Variant] = {
    DORA: Variant(_set("use_dora")),
    PISSA: Variant(lambda config: _init(config) == "pissa"),
    RANDOM_PISSA: Variant(
        lambda config: _init(config).startswith("pissa_niter_"),
        (f"{_MUTATES}: peft draws another random SVD on each load", _SAVE_CONVERTED),
    ),
    OLORA: Variant(lambda config: _init(config).startswith("olora")),
    "CorDA (init_lora_weights)": Variant(lambda config: _init(config).startswith("corda"), (_MUTATES, _SAVE_CONVERTED)),
    "LoftQ (init_lora_weights)": Variant(lambda config: _init(config).startswith("loftq"), (_MUTATES, _RETRAIN)),
    ALORA: Variant(lambda config: config.get("alora_invocation_tokens") is not None),
    "QALoRA (use_qalora)": Variant(_set("use_qalora"), ("its A reads pooled groups of inputs", _RETRAIN)),
    "BD-LoRA (use_bdlora)": Variant(_set("use_bdlora"), ("its factors are block-diagonal", _MERGE)),
    "KaSA (kasa_config)": Variant(_set("kasa_config"), ("it truncates the base weights", _RETRAIN)),
    "Arrow (arrow_config)": Variant(_set("arrow_config"), ("it routes between several adapters", _RETRAIN)),
    "MonteCLoRA (monteclora_config)": Variant(
        _set("monteclora_config"), ("its factors are random variables", _RETRAIN)
    ),
    PARAMETERS: Variant(_of_parameters),
    "LoRA of parameters that are neither experts' nor weights of modules (target_parameters)": Variant(
        lambda config: not all(name.endswith(_READ_PARAMETERS) for name in _parameters(config)),
        ("it updates parameters that are neither experts' nor weights of modules", _RETRAIN),
    ),
    "LoRA with biases (lora_bias)": Variant(_set("lora_bias")),
    "layer replication (layer_replication)": Variant(
        _set("layer_replication"), ("its layer numbers are not those of the base", _RETRAIN)
    ),
    BEAM: Variant(_set("use_beamlora")),
}

# Tensors that identify a refused kind whatever the configuration says.
REFUSED_TENSORS: Mapping[str, str] = {"kasa": f"KaSA: it truncates the base weights; {_RETRAIN}"}

# Initialisations of peft 0.21 that do not change the base weights.
_PLAIN_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica", "lora_ga"})

_TOKENS = "it adds trained vectors to the model's input and changes no weight matrix"
_ROTATES = "it rotates weight matrices, a change of full rank"
_ROUTES = "it routes between several adapters"
_FORM = "its update is not stored as two factors"

# peft type -> why its update cannot be read, and what to do instead; conversions were tried with peft 0.21.
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
# Every peft_type of peft 0.21.
KNOWN_TYPES = frozenset({*_REFUSED_TYPES, "ADALORA", "LOHA", "LOKR", "LORA", "UNILORA", "VBLORA", "VERA"})


def is_variant(config: Config, variant: str) -> bool:
    """Return whether a configuration of type LORA is of a variant, a key of `VARIANTS`."""
    return VARIANTS[variant].applies(config)


def why_refused(peft_type: str) -> str:
    """Say why an adapter of a `peft_type`, in capitals, is not read, and what to do about it."""
    return "; ".join(_REFUSED_TYPES.get(peft_type, ("it is not known", f"if peft knows it, {_CONVERT}")))


def check_type(config: Config, where: str, types: Collection[str]) -> None:
    """Refuse a configuration whose `peft_type` is not one of `types`; `where` is its path."""
    if "fine_tune_type" in config:
        msg = f"{where}: has both peft_type, of PEFT, and fine_tune_type, of MLX: remove the one that does not apply"
        raise AdapterError(msg)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise AdapterError(f"{where}: peft_type is {peft_type!r}, expected a name such as 'LORA': correct the file")
    if peft_type.upper() not in types:
        msg = f"{where}: an adapter of type {peft_type!r} is not supported: {why_refused(peft_type.upper())}"
        raise AdapterError(msg)


def check_lora(config: Config, where: str) -> None:
    """Refuse a configuration of type LORA whose update is not defined: a variant, or an invalid value."""
    for name, variant in VARIANTS.items():
        if variant.refusal is not None and variant.applies(config):
            why, cure = variant.refusal
            raise AdapterError(f"{where}: {name} is not supported: {why}; {cure}")
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _PLAIN_INITS and not is_variant(config, PISSA) and not is_variant(config, OLORA):
        msg = f"{where}: init_lora_weights {init!r} is not known: it may have changed the base weights; use a plain "
        raise AdapterError(msg + "LoRA")
    check_numbers(config, where)
    check_targets(config, where)


def config_notes(config: Config) -> tuple[str, ...]:
    """List settings that do not move with the factors, one sentence each."""
    notes = []
    if config.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out is true, which peft ignores on linear layers; it was ignored.")
    if _init(config) == "lora_ga":
        notes.append(
            "init_lora_weights is lora_ga: if training changed the base weights, that change is not in the adapter."
        )
    unknown = [key for key, value in config.items() if key not in _KNOWN_KEYS and value]
    return (*notes, *(f"config key {key} is not known and was ignored." for key in unknown))


def check_rank(config: Config, where: str, key: str = "r") -> None:
    """Refuse a configuration whose value for `key` is not a whole number of 1 or more."""
    check_value(config, where, key, is_rank, "a whole number of 1 or more")


def check_numbers(config: Config, where: str, alpha: str = "lora_alpha") -> None:
    """Refuse invalid ranks and scales; `alpha` is the key of the number that is divided by the rank."""
    check_rank(config, where)
    check_value(config, where, alpha, is_alpha, "a number other than 0")
    if config.get("use_rslora"):
        check_value(config, where, "use_rslora", lambda value: isinstance(value, bool), "true or false")
    for table, valid, wanted in (("rank_pattern", is_rank, "ranks"), ("alpha_pattern", is_alpha, "numbers")):
        values = config.get(table) or {}
        if not isinstance(values, dict):
            msg = f"{where}: {table} is {shown(config, table)}, expected an object of {wanted}: correct the file"
            raise AdapterError(msg)
        for key, value in values.items():
            if not valid(value) or not is_matchable(key):
                msg = f"{where}: {table} has {key!r}: {value!r}, expected a pattern and one of {wanted}: correct it"
                raise AdapterError(msg)


def check_targets(config: Config, where: str) -> None:
    """Refuse `target_modules` that are not names."""
    targets = config.get("target_modules")
    as_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if targets is not None and not isinstance(targets, str) and not as_list:
        msg = f"{where}: target_modules is {shown(config, 'target_modules')}, expected names: correct the file"
        raise AdapterError(msg)


def check_value(config: Config, where: str, key: str, valid: Callable[[Any], bool], wanted: str) -> None:
    """Refuse a configuration whose value for `key` is missing or invalid; `wanted` describes a valid one."""
    if not valid(config.get(key)):
        raise AdapterError(f"{where}: {key} is {shown(config, key)}, expected {wanted}: correct the file")


def is_rank(value: Any) -> bool:
    """Return whether a JSON value can be a rank: a whole number of 1 or more."""
    return is_alpha(value) and value == int(value) and value >= 1


def is_alpha(value: Any) -> bool:
    """Return whether a JSON value can be a lora_alpha: finite and not 0, as 0 would make the update zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e30 and not math.isnan(value) and value != 0


def shown(config: Config, key: str) -> str:
    """Format a value for a message, shortened; "missing" if it is absent."""
    return repr(config[key])[:60] if key in config else "missing"
