"""Translate GGUF metadata into a Hugging Face configuration, for the architectures of the family table.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's converter. Values that llama.cpp
implies (Gemma's layer pattern, its second rope base, the query scale of the 27B models) are written out, so that the
result builds the same model in transformers.

Rotary settings take the form of transformers 5.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jcrosslora.architectures.blocks import LatentAttention
from jcrosslora.architectures.ropes import llama3_factors
from jcrosslora.checkpoint.gguf_header import Metadata
from jcrosslora.checkpoint.layout import holder_of
from jcrosslora.checkpoint.store import errors_of
from jcrosslora.errors import CheckpointError

# Layers of the 27B models, whose queries are scaled by hidden / heads instead of by the head size.
_LAYERS_27B = {"gemma2": 46, "gemma3": 62}
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
# `Family.norm` -> keys of the epsilon; the first one present is used.
_EPSILONS = {"rms": ("layer_norm_rms_epsilon", "layer_norm_epsilon"), "layer": ("layer_norm_epsilon",)}


def translate(meta: Metadata, facts: Mapping[str, Any], factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the configuration of a GGUF model with Hugging Face keys.

    Args:
        facts: values from its tensors: vocab_size, tie_word_embeddings, and "held", the layers that hold each tensor.
        factors: its rope factor tensors by GGUF name: rope_freqs (llama3), or rope_factors_long and _short (longrope).

    Raises CheckpointError if rope scaling, or another value, is not supported.
    """
    family = meta.family
    # Nemotron-H has RMS norms, but its files state only the other epsilon.
    stated_eps = [meta.number(f"attention.{key}") for key in _EPSILONS[family.norm]]
    config = {
        "model_type": family.name,
        "architectures": [family.architectures[0]],
        "hidden_size": meta.count("embedding_length"),
        "intermediate_size": meta.most("feed_forward_length"),
        "num_hidden_layers": meta.layers(),
        "num_attention_heads": meta.count("attention.head_count"),
        "num_key_value_heads": meta.most("attention.head_count_kv") or meta.count("attention.head_count"),
        family.eps.key: next((eps for eps in stated_eps if eps is not None), None),
        "max_position_embeddings": meta.count("context_length"),
        "vocab_size": facts["vocab_size"],
        "tie_word_embeddings": facts["tie_word_embeddings"],
        "rope_parameters": _rope_parameters(meta, factors),
        family.activation_key: family.activation,
        **{f"{key}_token_id": meta.values.get(f"tokenizer.ggml.{name}_token_id") for key, name in _TOKENS.items()},
    }
    if family.name != "phi3":  # Phi3Config has no such key.
        config["head_dim"] = meta.head_dim()
    held, form = facts["held"], family.gguf
    if family.rms_key is not None:
        config[family.rms_key] = meta.number("attention.layer_norm_rms_epsilon")
    for key, roles in family.bias_keys.items():
        config[key] = any(f"{holder_of(family, role)}.bias" in held for role in roles)
    if family.qk_norm_key is not None and "q" in family.norms:
        config[family.qk_norm_key] = f"{family.norms['q']}.weight" in held
    assert form is not None
    stated = {key: meta.number(stored) for key, stored in form.numbers.items()}
    stated |= {key: meta.count(stored) for key, stored in form.counts.items()}
    config |= {key: value for key, value in stated.items() if value is not None}
    config |= _expert_settings(meta) | dict(form.implied)
    config |= _windows(meta) | _other_keys(meta)
    with errors_of(meta.file.path):
        return config if form.settings is None else config | dict(form.settings(meta.own(), held))


def _expert_settings(meta: Metadata) -> dict[str, Any]:
    experts = meta.family.experts
    if experts is None or not meta.count("expert_count"):
        return {} if experts is None else {experts.count[0]: 0}
    sizes = {experts.count[0]: "expert_count", experts.used: "expert_used_count"}
    if experts.width != "intermediate_size":
        sizes[experts.width] = "expert_feed_forward_length"
    found: dict[str, Any] = {key: meta.most(stored) for key, stored in sizes.items()}
    if experts.groups is not None:
        stated = ("expert_group_count", "expert_group_used_count")
        found |= {key: meta.count(one) or 1 for key, one in zip(experts.groups, stated, strict=True)}
    if isinstance(experts.normalised, str):
        found[experts.normalised] = bool(meta.get("expert_weights_norm", False))
    if experts.scale is not None:
        found[experts.scale.key] = meta.number("expert_weights_scale") or 1.0
    scores, own = meta.get("expert_gating_func"), {experts.scores, *experts.scores_names.values()}
    if scores is not None and own.isdisjoint(meta.scores):
        name = meta.family.name
        meta.file.refuse(f"{meta.arch}.expert_gating_func is {str(scores)[:60]}, which {name} does not have")
    return {key: value for key, value in found.items() if value is not None}


def _windows(meta: Metadata) -> dict[str, Any]:
    windows, size = meta.family.windows, meta.count("attention.sliding_window") or None
    if windows is None or windows.chunked:  # llama.cpp implies the chunks of Llama 4
        return {}
    if windows.switch is not None:  # The converter writes no window for these.
        return {windows.switch: False}
    if windows.period is None:
        return {"sliding_window": size}
    return {"sliding_window": size, "layer_types": _layer_types(meta, windows.period)}


def _other_keys(meta: Metadata) -> dict[str, Any]:
    scale = meta.family.attn_scale
    if meta.family.positions.outer_original is not None:
        return {_ORIGINAL: _original(meta)}
    if scale is None or scale.key != "query_pre_attn_scalar":
        return {}
    if meta.count("block_count") != _LAYERS_27B[meta.arch]:
        return {"query_pre_attn_scalar": meta.head_dim()}
    width, heads = meta.count("embedding_length") or 0, meta.count("attention.head_count") or 1
    return {"query_pre_attn_scalar": width // heads}


def _original(meta: Metadata) -> int | None:
    return meta.count("rope.scaling.original_context_length") or meta.count("context_length")


def _layer_types(meta: Metadata, period: int) -> list[str]:
    # The pattern is a period or one flag per layer; the default is that of llama.cpp and transformers.
    stated = meta.get("attention.sliding_window_pattern")
    layers = meta.layers()
    if layers is None or not 0 < layers < 10_000:
        meta.file.refuse(f"{meta.arch}.block_count is {layers!r}, expected the number of layers")
    # With or without entries for multi-token prediction layers.
    if isinstance(stated, list) and len(stated) in (layers, meta.count("block_count")):
        stated = stated[:layers]
        return ["sliding_attention" if flag else "full_attention" for flag in stated]
    period = stated if type(stated) is int and stated > 0 else period
    return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]


_DEFAULT_BASE = 10_000.0  # in llama.cpp and transformers
_ORIGINAL = "original_max_position_embeddings"


def _rope_parameters(meta: Metadata, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    theta, rules = meta.number("rope.freq_base") or _DEFAULT_BASE, meta.family.positions
    if "proportional" in rules.types:
        return _proportional(meta, theta, factors.get("rope_freqs.weight"))
    scaling: dict[str, Any] = {"rope_theta": theta, **_scaling(meta, factors)}
    if rules.local_theta is not None:
        # If the configuration states no base for layers with windows, llama.cpp uses the other layers' base.
        usual = theta if rules.local_theta_key is None else rules.local_theta
        plain = {"rope_theta": meta.number("rope.freq_base_swa") or usual, "rope_type": "default"}
        return {"full_attention": scaling, "sliding_attention": plain}
    if rules.share is not None:
        head_dim = meta.head_dim()
        scaling["partial_rotary_factor"] = (meta.count("rope.dimension_count") or head_dim) / max(head_dim, 1)
    if rules.grows:
        scaling |= _growing(meta, scaling)
    return scaling


_NEVER = 1e29  # divisors of frequencies beyond this leave a pair unchanged: files have 1e30


def _proportional(meta: Metadata, theta: float, divisors: np.ndarray | None) -> dict[str, Any]:
    """Return the settings of each kind of layer of Gemma 4.

    In full attention a file states which pairs are rotated: the first, whose frequencies it divides by 1.
    """
    size, local = meta.head_dim(), meta.count("attention.key_length_swa")
    rotated = 0 if divisors is None else int(np.sum(divisors == 1.0))
    if divisors is None or 2 * divisors.size != size or not np.all(divisors[rotated:] > _NEVER):
        what = f"rope_freqs.weight is missing, or does not hold 1 for the first pairs of {size} features "
        meta.file.refuse(what + "and 1e30 for the others: convert the model again")
    sizes = {"rope.dimension_count": size, "rope.dimension_count_swa": local}
    others = [key for key, whole in sizes.items() if whole and meta.count(key) not in (None, whole)]
    others += ["rope.scaling.type"] if meta.get("rope.scaling.type", "none") != "none" else []
    if others:
        meta.file.refuse(f"{meta.arch}.{others[0]} is {str(meta.get(others[0]))[:60]!r}, which is not supported")
    plain = {"rope_type": "default", "rope_theta": meta.number("rope.freq_base_swa") or theta}
    share = 2 * rotated / size
    if int(share * size // 2) < rotated:  # by which the class finds the pairs
        share = float(np.nextafter(share, 1.0))
    turned = {"rope_type": "proportional", "partial_rotary_factor": share, "rope_theta": theta}
    return {"full_attention": turned, "sliding_attention": plain}


def _growing(meta: Metadata, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope settings that only Ministral 3 and Mistral 4 (yarn) have; files state one of two mscales, of 1.

    Query growth is stated or implied; files with another growth than the class, or another mscale, are refused.
    """
    beta = meta.number("attention.temperature_scale") or scaling.get("llama_4_scaling_beta")
    wanted = 0.1 if LatentAttention in meta.family.blocks else 1.0
    mscale = meta.number("rope.scaling.yarn_log_multiplier")
    if beta is None or mscale not in (None, wanted):
        what = f"{meta.arch}.attention.temperature_scale is missing, or rope.scaling.yarn_log_multiplier is {mscale}, "
        meta.file.refuse(what + f"expected {wanted:g}: use the safetensors of the model")
    step = meta.count("attention.temperature_length")
    if step is not None and step != scaling.get(_ORIGINAL):
        what = f"{meta.arch}.attention.temperature_length is {step}, expected the original context length: "
        meta.file.refuse(what + "use the safetensors of the model")
    return {"llama_4_scaling_beta": beta} | ({} if mscale is None else {"mscale": 1.0, "mscale_all_dim": 1.0})


def _scaling(meta: Metadata, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if "rope_freqs.weight" in factors:
        return _llama3_scaling(factors["rope_freqs.weight"], meta)
    if "rope_factors_long.weight" in factors and "rope_factors_short.weight" in factors:
        return {
            "rope_type": "longrope",
            "long_factor": _decimals(factors["rope_factors_long.weight"]),
            "short_factor": _decimals(factors["rope_factors_short.weight"]),
        }
    kind, factor = meta.get("rope.scaling.type", "none"), meta.number("rope.scaling.factor")
    if kind == "none" or (factor is None and meta.arch == "phi3"):
        return {"rope_type": "default"}
    if kind == "linear" and factor is not None:
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or factor is None:
        meta.file.refuse(f"rope scaling {kind!r} with factor {factor} is not supported")
    form, keys = meta.family.gguf, {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    keys |= {"attention_factor": "yarn_attn_factor"}
    stated = {key: meta.number(f"rope.scaling.{stored}") for key, stored in keys.items()}
    stated = {key: value for key, value in stated.items() if value is not None}
    assert form is not None
    if LatentAttention in meta.family.blocks and (scale := meta.number("rope.scaling.yarn_log_multiplier")):
        # A tenth of one of two mscales, which are equal in published models.
        stated |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10.0 * scale, 6))
    return {"rope_type": "yarn", "factor": factor, _ORIGINAL: _original(meta), **stated, **form.rope}


def _decimals(values: np.ndarray) -> list[float]:
    return [float(str(value)) for value in values.astype(np.float32)]


def _llama3_scaling(stored: np.ndarray, meta: Metadata) -> dict[str, Any]:
    # The file keeps only the resulting factors. Every published Llama 3 uses the same three constants with the
    # factor, and Llama 4 another one; the formula with them must give the stored numbers, otherwise the settings are
    # unknown.
    theta = meta.number("rope.freq_base") or _DEFAULT_BASE
    for high in (4.0, 1.0):
        settings: dict[str, Any] = {
            "factor": round(float(stored.max(initial=1.0)), 4),  # free of float32 rounding; checked below
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            _ORIGINAL: 8192,
        }
        with np.errstate(divide="ignore", invalid="ignore"):  # no transition between equal bounds
            factors = llama3_factors(stored.size, {"rope_theta": theta, **settings})
        if np.allclose(factors, stored, rtol=1e-4):
            return {"rope_type": "llama3", **settings}
    msg = f"{meta.file.path}: rope_freqs.weight does not follow the llama3 rule with its published constants"
    raise CheckpointError(msg)
