"""Tables of the kinds of adapter that are refused because they cannot be read as an update of weight matrices."""

from collections.abc import Mapping

from jcrosslora.adapter.kinds import variants

_CONVERT = "convert it with peft first (peft.save_as_lora(path, model, rank)) and load the result"
_RETRAIN = "no conversion exists; train a plain LoRA adapter instead"

_MUTATES = "its training changed the base weights, and the change is not in the adapter"
_SAVE_CONVERTED = (
    "save it with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...) and load the result"
)

# Variant of LORA -> why it is not dW = scale B A, and what the user can do.
REFUSED: Mapping[str, tuple[str, str]] = {
    variants.CORDA: (_MUTATES, _SAVE_CONVERTED),
    variants.LOFTQ: (_MUTATES, _RETRAIN),
    variants.QALORA: ("its A reads pooled groups of inputs", _RETRAIN),
    variants.BDLORA: ("its factors are block-diagonal", _CONVERT),
    variants.KASA: ("it truncates the base weights", _RETRAIN),
    variants.ARROW: ("it routes between several adapters", _RETRAIN),
    variants.MONTECLORA: ("its factors are random variables", _RETRAIN),
    variants.PARAMETERS: ("it updates three-dimensional expert weights", _RETRAIN),
    variants.REPLICATION: ("its layer numbers are not those of the base", _RETRAIN),
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

# peft type -> why its update cannot be read, and what the user can do.
_REFUSED_TYPES: Mapping[str, tuple[str, str]] = {
    "PROMPT_TUNING": (_TOKENS, _RETRAIN),
    "MULTITASK_PROMPT_TUNING": (_TOKENS, _RETRAIN),
    "P_TUNING": (_TOKENS, _RETRAIN),
    "PREFIX_TUNING": (_TOKENS, _RETRAIN),
    "ADAPTION_PROMPT": (_TOKENS, _RETRAIN),
    "CARTRIDGE": (_TOKENS, _RETRAIN),
    "CPT": (_TOKENS, _RETRAIN),
    "LN_TUNING": ("it changes norms alone", _RETRAIN),
    "TRAINABLE_TOKENS": ("it changes rows of the embedding alone", _RETRAIN),
    "XLORA": (_ROUTES, _RETRAIN),
    "POLY": (_ROUTES, _RETRAIN),
    "IA3": ("it rescales activations, a change of full rank", _CONVERT),
    "HIRA": ("it multiplies the weights entry by entry, a change of full rank", _CONVERT),
    "OFT": (_ROTATES, _CONVERT),
    "BOFT": (_ROTATES, _CONVERT),
    "HRA": (_ROTATES, _CONVERT),
    "ROAD": (_ROTATES, _CONVERT),
    "PSOFT": (_ROTATES, _CONVERT),
    "FOURIERFT": ("its frequencies are drawn by torch", _CONVERT),
}


def why_refused(peft_type: str) -> str:
    """Say why an adapter of a `peft_type`, in capitals, is not read, and what to do about it."""
    why, cure = _REFUSED_TYPES.get(peft_type, ("", f"where peft supports it, {_CONVERT}"))
    return f"{why}; {cure}" if why else cure


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
