"""All that decides the maths of a forward pass, read once from a configuration; hashable, so static under jit."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder.rope_settings import Rope, read_ropes
from jcrosslora.decoder.windows import layer_windows, read_layer_kinds, read_window
from jcrosslora.errors import CheckpointError

# Name in configurations -> the function, see `ops.ACTIVATIONS`.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_GEMMA = ("gemma2", "gemma3_text")
# What the configuration classes assume where a file leaves the key out.
_EPS = {"phi3": 1e-5}
_SCORE_CAP, _FINAL_CAP = {"gemma2": 50.0}, {"gemma2": 30.0}
_QUERY_WIDTH = 256


@dataclass(frozen=True)
class DecoderSettings:
    """The forward pass of one model.

    Attributes:
        layers: L.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: features of a head.
        vocab: tokens.
        eps: added to the mean square in every norm.
        activation: "silu", "gelu" (exact) or "gelu_tanh".
        query_scale: factor on the attention scores.
        score_cap: soft cap of the attention scores, or None.
        final_cap: soft cap of the logits, or None.
        embedding_scale: factor on the embedding.
        tied: whether the head is the embedding.
        head_norms: whether queries and keys are normed by head.
        post_norms: whether the outputs of attention and MLP are normed before they are added.
        biased: roles with a bias.
        windows: (L,) positions that a layer sees, its own included; None for all.
        ropes: the different rotary settings.
        rope_of_layer: (L,) index into `ropes`.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    activation: str
    query_scale: float
    score_cap: float | None
    final_cap: float | None
    embedding_scale: float
    tied: bool
    head_norms: bool
    post_norms: bool
    biased: tuple[str, ...]
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    rope_of_layer: tuple[int, ...]


def settings_of(base: BaseModel) -> DecoderSettings:
    """Read the settings of a base.

    Raises:
        CheckpointError: its configuration asks for something that the decoder does not do, named in the message.
    """
    config, family, dims, ref = base.config, base.family, base.dims, base.ref
    kinds = read_layer_kinds(config, family.name, dims.layers, ref)
    per_kind = read_ropes(config, family.name, dims, ref)
    missing = sorted(set(kinds) - set(per_kind))
    if missing:
        msg = f"{ref}: rope_parameters has no entry for {missing[0]} layers"
        raise CheckpointError(msg)
    ropes = tuple(dict.fromkeys(per_kind[kind] for kind in kinds))
    gemma = family.name in _GEMMA
    return DecoderSettings(
        layers=dims.layers,
        hidden=dims.hidden,
        intermediate=dims.intermediate,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        head_dim=dims.head_dim,
        vocab=dims.vocab,
        eps=_number(config, "rms_norm_eps", _EPS.get(family.name, 1e-6), ref),
        activation=_activation(config, gemma, ref),
        query_scale=_number(config, "query_pre_attn_scalar", _QUERY_WIDTH, ref) ** -0.5
        if gemma
        else dims.head_dim**-0.5,
        score_cap=_cap(config, "attn_logit_softcapping", _SCORE_CAP.get(family.name), ref) if gemma else None,
        final_cap=_cap(config, "final_logit_softcapping", _FINAL_CAP.get(family.name), ref) if gemma else None,
        embedding_scale=math.sqrt(dims.hidden) if gemma else 1.0,
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        head_norms=bool(family.head_norms),
        post_norms=bool(family.norm_out),
        biased=_biased(base),
        windows=layer_windows(kinds, read_window(config, family.name, ref), ref),
        ropes=ropes,
        rope_of_layer=tuple(ropes.index(per_kind[kind]) for kind in kinds),
    )


def _biased(base: BaseModel) -> tuple[str, ...]:
    keyed = [role for key, roles in base.family.bias_keys.items() if base.config.get(key) for role in roles]
    return (*base.family.biases, *keyed)


def _activation(config: Mapping[str, Any], gemma: bool, ref: str) -> str:
    key, default = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    name = config.get(key) or default
    if name not in _ACTIVATIONS:
        msg = f"{ref}: {key} {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        raise CheckpointError(msg)
    return _ACTIVATIONS[name]


def _cap(config: Mapping[str, Any], key: str, default: float | None, ref: str) -> float | None:
    absent = config.get(key, default) is None
    return None if absent else _number(config, key, default, ref)


def _number(config: Mapping[str, Any], key: str, default: float | None, ref: str) -> float:
    value = config.get(key, default)
    # An integer of 400 digits is below infinity, but no float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        msg = f"{ref}: {key} is {str(value)[:60]!r}, wanted a positive number"
        raise CheckpointError(msg)
    return float(value)
