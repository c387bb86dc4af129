"""Multimodal models: the text model in each class, and the names of its tensors and modules.

Sources: transformers 5.24 (module names of the classes, defaults of their configurations, and `conversion_mapping.py`
for the names in files), vLLM (`hf_to_vllm_mapper` of each class, which takes the names of transformers 5).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from jcrosslora.architectures import FAMILIES
from jcrosslora.architectures.config import COMMON_KEYS, HARMLESS_KEYS
from jcrosslora.errors import CheckpointError
from jcrosslora.utils.texts import shortened

TEXT = "model."  # prefix of a text model's modules, and of its tensors `layers`, `embed_tokens` and `norm`
_AUDIO_KEYS = frozenset({"audio_config", "audio_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index"})
_LANGUAGE, _TEXT_MODEL = "model.language_model.", "model.text_model."


@dataclass(frozen=True)
class Wrapper:
    """A class of transformers with a text model inside, `<name>ForConditionalGeneration`.

    Attributes:
        text_type: `model_type` of a text_config that states none.
        family: of the only text model that the class can have; None if every family is accepted, under its own name.
        prefix: replaces "model." for the text model's modules in transformers 5; the head is `lm_head`.
        flat: whether older configurations have the text model's settings at the top level.
        keys: further keys of the outer configuration that do not affect the text model.
    """

    name: str
    text_type: str
    family: str | None = None
    prefix: str = _LANGUAGE
    flat: bool = False
    keys: frozenset[str] = frozenset()

    @property
    def architecture(self) -> str:
        """Name of the class."""
        return f"{self.name}ForConditionalGeneration"

    @property
    def texts(self) -> Mapping[str, str]:
        """Map the `model_type` that a text_config may have to the family."""
        return {name: name for name in FAMILIES} if self.family is None else {self.text_type: self.family}


WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper("Gemma3", "gemma3_text", "gemma3_text"),
    "gemma4": Wrapper("Gemma4", "gemma4_text", "gemma4_text", keys=_AUDIO_KEYS),
    "gemma4_unified": Wrapper("Gemma4Unified", "gemma4_unified_text", "gemma4_unified_text", keys=_AUDIO_KEYS),
    "idefics3": Wrapper("Idefics3", "llama", prefix=_TEXT_MODEL),
    "internvl": Wrapper("InternVL", "qwen2"),
    "llama4": Wrapper("Llama4", "llama4_text", "llama4_text", prefix="language_model.model."),
    "llava": Wrapper("Llava", "llama"),
    "llava_next": Wrapper("LlavaNext", "llama"),
    "llava_onevision": Wrapper("LlavaOnevision", "qwen2"),
    "mistral3": Wrapper("Mistral3", "mistral"),
    "qwen2_vl": Wrapper("Qwen2VL", "qwen2_vl_text", "qwen2", flat=True),
    "qwen2_5_vl": Wrapper("Qwen2_5_VL", "qwen2_5_vl_text", "qwen2", flat=True),
    "qwen3_5": Wrapper("Qwen3_5", "qwen3_5_text", "qwen3_5_text"),
    "qwen3_5_moe": Wrapper("Qwen3_5Moe", "qwen3_5_moe_text", "qwen3_5_moe_text"),
    "qwen3_vl": Wrapper("Qwen3VL", "qwen3_vl_text", "qwen3"),
    "smolvlm": Wrapper("SmolVLM", "llama", prefix=_TEXT_MODEL),
}

# Prefixes of a text model in files of transformers 4 and 5, vLLM, MLX and Nemotron's class -> prefixes in a text-only
# model.
TEXT_PREFIXES: Mapping[str, str] = {
    outer + inner: name
    for outer in (_LANGUAGE, "language_model.", _TEXT_MODEL, "text_model.")
    for inner, name in ((TEXT, TEXT), ("lm_head", "lm_head"), ("", TEXT))
} | {"backbone.": TEXT}
# The same for tensors in a checkpoint; tensors of other parts have none of these prefixes.
TENSOR_PREFIXES: Mapping[str, str] = TEXT_PREFIXES | {
    name: name for name in ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
}
# Other parts than the text model, after "model." or at the top.
OTHER_PARTS = frozenset(
    {
        *("audio_tower", "connector", "embed_audio", "embed_vision", "image_newline", "multi_modal_projector"),
        *("vision_embed_tokens", "vision_embedder", "vision_model", "vision_tower", "visual"),
    }
)

# Keys of the outer configuration that do not affect the text model.
_KEYS = frozenset(
    {
        *("text_config", "vision_config", "_pad_token_id", "ignore_index", "use_reentrant_checkpointing"),
        *(f"{kind}_token_{end}" for kind in ("boi", "eoi", "image", "video") for end in ("id", "index")),
        *("vision_start_token_id", "vision_end_token_id", "vision_token_id"),
        *("image_grid_pinpoints", "image_seq_length", "mm_tokens_per_image", "vision_aspect_ratio"),
        *("multimodal_projector_bias", "projector_hidden_act", "downsample_ratio", "scale_factor"),
        *("spatial_merge_size", "vision_feature_layer", "vision_feature_select_strategy"),
        "use_image_newline_parameter",
    }
)
# Left by the training of Idefics in a text_config.
_TRAINING_KEYS = frozenset({"neftune_noise_alpha", "perceiver_config", "pixel_shuffle_factor", "num_image_tokens"})
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "num_key_value_heads",
)
# Defaults of the configuration classes, which a text_config may leave out.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": dict(zip(_SIZES[:-1], (32_000, 4096, 11_008, 32, 32), strict=True)),
    "mistral": dict(zip(_SIZES, (32_000, 4096, 14_336, 32, 32, 8), strict=True)),
    "mistral4": dict(zip(_SIZES, (131_072, 4096, 12_288, 36, 32, 32), strict=True)),
    "qwen2": dict(zip(_SIZES, (151_936, 4096, 22_016, 32, 32, 32), strict=True)),
    "qwen3": dict(zip(_SIZES, (151_936, 4096, 22_016, 32, 32, 32), strict=True)),
    "gemma2": dict(zip(_SIZES, (256_000, 2304, 9216, 26, 8, 4), strict=True)),
    "qwen2_vl_text": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "qwen2_5_vl_text": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "qwen3_vl_text": {"rope_theta": 5e5, "head_dim": 128},
}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the text model in a multimodal one, with its family's name as `model_type`.

    Raises CheckpointError that names an unknown architecture, key or text_config.
    """
    model_type, wrapper = config["model_type"], WRAPPERS[config["model_type"]]
    if (named := config.get("architectures")) and named != [wrapper.architecture]:
        msg = f"architectures {named!r} is not supported for {model_type}; supported: {wrapper.architecture}"
        raise CheckpointError(msg)
    text = config.get("text_config")
    if text is None and wrapper.flat:
        text = {key: value for key, value in config.items() if key not in _KEYS | {"model_type", "architectures"}}
    else:
        for key, value in config.items():
            if key not in COMMON_KEYS | HARMLESS_KEYS | _KEYS | wrapper.keys and not is_empty(value):
                refuse_unknown(key, shortened(repr(value)), model_type)
    if not isinstance(text, Mapping):
        raise CheckpointError(f"text_config of model_type {model_type!r} is {str(text)[:60]!r}, expected a JSON object")
    text_type = text.get("model_type") or wrapper.text_type
    if not isinstance(text_type, str) or text_type not in wrapper.texts:
        msg = f"the text_config of this {model_type} is of model_type {str(text_type)[:60]!r}, which is not "
        raise CheckpointError(msg + f"supported; supported: {', '.join(wrapper.texts)}")
    found = {key: value for key, value in text.items() if key not in _TRAINING_KEYS | {"architectures"}}
    found = {**_DEFAULTS.get(text_type, {}), **found}
    # Older files state it only for the text model.
    if tied := [one for part in (config, text) if (one := part.get("tie_word_embeddings")) is not None]:
        found["tie_word_embeddings"] = any(tied)
    if "quantization_config" in config:
        found["quantization_config"] = config["quantization_config"]
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(found.get(key), Mapping):
            found[key] = _rope_of_text(found[key])
    return found | {"model_type": wrapper.texts[text_type]}


def refuse_unknown(key: str, value: str, family: str) -> NoReturn:
    """Raise CheckpointError for an unknown configuration key."""
    msg = f"config key {key!r}={value} is not known for {family}; it may change what the weights mean: remove it from "
    raise CheckpointError(msg + "config.json if it does not")


def is_empty(value: Any) -> bool:
    """Tell whether the value of an unknown key is None, False or empty, and so can be ignored."""
    return value is None or value is False or value in ({}, [])


def _rope_of_text(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the three axes of Qwen's positions (mrope), which are equal in text."""
    plain = {key: value for key, value in settings.items() if key not in ("mrope_section", "mrope_interleaved")}
    return {key: "default" if value == "mrope" and "type" in key else value for key, value in plain.items()}


def text_module_name(module: str) -> str:
    """Rename a module as in text-only models: `model.layers...`, `lm_head`."""
    for outer, inner in TEXT_PREFIXES.items():
        if module.startswith(outer):
            return inner + module.removeprefix(outer)
    return module


def class_module_name(module: str, prefix: str) -> str:
    """Rename a text model's module or tensor as in a class with this prefix; inverse of `text_module_name`.

    The prefix is "model.", `Wrapper.prefix`, or another key of `TEXT_PREFIXES`.
    """
    if module.startswith(TEXT):
        return prefix + module.removeprefix(TEXT)
    # A complete inner text model (transformers 4) includes its head.
    whole = prefix.endswith(f"_model.{TEXT}")
    return prefix.removesuffix(TEXT) + module if whole and module.startswith("lm_head") else module


def prefix_of(module: str) -> str:
    """Return the prefix that `class_module_name` needs to produce a module's name; "model." if none is known."""
    return next((outer for outer, inner in TEXT_PREFIXES.items() if inner == TEXT and module.startswith(outer)), TEXT)


def is_other_part(name: str) -> bool:
    """Tell whether a module or tensor is outside the text model, e.g. in the vision tower."""
    return name.removeprefix(TEXT).split(".", 1)[0] in OTHER_PARTS
