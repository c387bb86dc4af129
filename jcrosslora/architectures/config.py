"""The keys of configurations, and readers for the sizes and numbers of a model.

Readers raise a CheckpointError that names the key if a value is out of range, or missing without a default.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from jcrosslora.errors import CheckpointError

_LIMIT = 1 << 20  # on numbers that loops run over, such as experts, before the weights are read
MOST_LAYERS = 1 << 14


def words(text: str) -> frozenset[str]:
    """Split a list of keys at its spaces."""
    return frozenset(text.split())


# Sizes, positions and activations, understood in every family.
COMMON_KEYS = words(
    "model_type architectures hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim vocab_size tie_word_embeddings hidden_act rms_norm_eps "
    "max_position_embeddings rope_theta rope_scaling rope_parameters quantization_config compression_config"
)

# Settings of loading, training and generation, which do not change what the weights mean.
HARMLESS_KEYS = words(
    "_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled "
    "attn_implementation attention_dropout auto_map bos_token_id cache_implementation chunk_size_feed_forward "
    "decoder_start_token_id diversity_penalty dtype embd_pdrop encoder_no_repeat_ngram_size eos_token_id "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id hidden_dropout id2label "
    "initializer_range is_llama_config keys_to_ignore_at_inference label2id length_penalty max_length "
    "max_sequence_length max_window_layers min_length model_max_length no_repeat_ngram_size num_beam_groups "
    "num_beams num_return_sequences pad_token_id prefix problem_type repetition_penalty resid_pdrop return_dict "
    "sep_token_id suppress_tokens task_specific_params temperature tokenizer_class top_k top_p torch_dtype "
    "transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed unsloth_version "
    "unsloth_version_fixed use_cache use_flash_attn"
)
# The kinds of layers.
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True)
class Dims:
    """The sizes of a model; `hidden` is the width of the residual stream, `intermediate` that of a dense MLP."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class Number:
    """A positive number that follows from a configuration.

    Attributes:
        key: its configuration key; "" if all models have the default.
        default: value if the configuration does not state it; None if it must, or if there is no number then.
        power: the number is the value to this power.
    """

    key: str
    default: float | None = None
    power: float = 1.0


def number_keys(record: Any) -> Iterator[str]:
    """Yield the configuration keys of the numbers in the fields of a record, alone or in a dictionary or tuple."""
    for field in fields(record):
        value = getattr(record, field.name)
        held = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else [value]
        yield from (one.key for one in held if isinstance(one, Number) and one.key)


def refuse(key: str, value: Any, wanted: str) -> NoReturn:
    """Raise an error that names a configuration key, its value and the wanted values."""
    raise CheckpointError(f"config key {key!r} is {repr(value)[:60]}, expected {wanted}")


def size(config: Mapping[str, Any], key: str, default: int | None = None, *, limit: int = _LIMIT) -> int:
    """Return a size below a limit, or its default if the configuration says nothing or null."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < limit:
        refuse(key, value, "a positive integer")
    return value


def check_multiple(key: str, value: int, other_key: str, other: int) -> None:
    """Raise CheckpointError unless `value` is a multiple of `other`, so that groups of heads have one size."""
    if value % other:
        raise CheckpointError(f"{key} {value} is not a multiple of {other_key} {other}")


def layer_count(config: Mapping[str, Any]) -> int:
    """Return the number of layers."""
    layers = size(config, "num_hidden_layers", limit=1 << 31)
    if layers > MOST_LAYERS:
        refuse("num_hidden_layers", layers, f"at most {MOST_LAYERS}")
    return layers


def at_attention(stated: Mapping[str, Any], full: str, other: str) -> list[str]:
    """Return the kind of each layer by a GGUF file's metadata: `full` if it has key-value heads, else `other`."""
    heads = stated.get("attention.head_count_kv")
    if not isinstance(heads, list):
        msg = f"attention.head_count_kv is {str(heads)[:60]}, expected a list with the heads of each layer"
        raise CheckpointError(msg)
    return [full if count else other for count in heads]


def numbers(config: Mapping[str, Any], key: str, count: int) -> tuple[float, ...] | None:
    """Return a list of `count` numbers >= 0, None if the configuration states none."""
    stated = config.get(key)
    if stated is None:
        return None
    values = [_number(value) for value in stated] if isinstance(stated, list | tuple) else []
    found = tuple(value for value in values if value is not None and value >= 0)
    if len(found) != count or len(values) != count:
        msg = f"config key {key!r} is {str(stated)[:60]!r}, expected a list of {count} numbers that are not negative"
        raise CheckpointError(msg)
    return found


def _number(value: Any) -> float | None:
    # transformers 5 writes infinity this way, which JSON cannot express.
    if isinstance(value, Mapping) and value.get("__float__") == "Infinity":
        return float("inf")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def layer_kinds(config: Mapping[str, Any], names: Mapping[str, str], layers: int | None = None) -> list[str] | None:
    """Return `layer_types`, mapped by `names` to our kinds of layers; None if the configuration has none."""
    stated = config.get("layer_types")
    if stated is None:
        return None
    layers = layer_count(config) if layers is None else layers
    if not isinstance(stated, list | tuple) or len(stated) != layers:
        refuse("layer_types", stated, f"a list of {layers} kinds")
    unknown = [kind for kind in stated if not isinstance(kind, str) or kind not in names]
    if unknown:
        raise CheckpointError(f"layer type {str(unknown[0])[:60]!r} is not supported; supported: {', '.join(names)}")
    return [names[kind] for kind in stated]


def read_number(config: Mapping[str, Any], number: Number, where: object = None) -> float:
    """Read a number of a configuration; errors name `where`, its file or base."""
    value = config.get(number.key, number.default)
    # An integer of 400 digits compares below infinity, but is too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        msg = f"{number.key} is {str(value)[:60]!r}, expected a positive number"
        raise CheckpointError(msg if where is None else f"{where}: {msg}")
    return float(value) ** number.power


def period_of(config: Mapping[str, Any], keys: tuple[str, ...], default: int) -> int:
    """Return the period of a layer pattern from the first key that is stated, else `default`."""
    key, period = next(((key, config[key]) for key in keys if config.get(key)), ("", default))
    if type(period) is not int or period < 1:
        refuse(key, period, "a positive integer")
    return period


def listed_rotated(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Return which layers have positions: those with a 1 in `no_rope_layers`, by default all but every fourth."""
    stated = config.get("no_rope_layers")
    if not stated:
        period = period_of(config, ("no_rope_layer_interval",), 4)
        return tuple((layer + 1) % period != 0 for layer in range(layers))
    if not isinstance(stated, list | tuple) or len(stated) < layers or not all(flag in (0, 1) for flag in stated):
        refuse("no_rope_layers", stated, f"a list of 0 or 1 for each of {layers} layers")
    return tuple(bool(flag) for flag in stated[:layers])
