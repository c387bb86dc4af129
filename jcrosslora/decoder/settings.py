"""Read the settings of a forward pass from a configuration; they are hashable, and static under jit.

Which layers use sliding windows follows the rule of each family.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jcrosslora.checkpoint import BaseModel, Dims
from jcrosslora.decoder.rope_scaling import Rope
from jcrosslora.decoder.rope_settings import FULL, SLIDING, read_ropes
from jcrosslora.errors import CheckpointError

# Name in configurations -> name in `ops.ACTIVATIONS`.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_GEMMA = ("gemma2", "gemma3_text")
# Defaults of the configuration classes of transformers, whose gemma3 ignores a soft cap of the attention scores.
_EPS = {"phi3": 1e-5}
_ATTN_SOFT_CAP, _FINAL_SOFT_CAP = {"gemma2": 50.0}, {"gemma2": 30.0}
_QUERY_PRE_ATTN_SCALAR = 256


@dataclass(frozen=True)
class DecoderSettings(Dims):
    """The settings of one model's forward pass, beside its sizes.

    Attributes:
        eps: added to the mean square in every norm.
        activation: "silu", "gelu" (exact) or "gelu_tanh".
        attn_scale: factor on the attention scores.
        attn_soft_cap: soft cap of the attention scores, or None.
        final_soft_cap: soft cap of the logits, or None.
        embedding_scale: factor on the embedding.
        tied: whether the head is the embedding.
        qk_norms: whether queries and keys are normalised per head.
        post_norms: whether the outputs of attention and MLP are normalised before they are added.
        biased_roles: roles with a bias.
        windows: (L,) number of visible positions of a layer, its own included; None for all.
        ropes: the different rotary settings.
        layer_ropes: (L,) index into `ropes`.
    """

    eps: float
    activation: str
    attn_scale: float
    attn_soft_cap: float | None
    final_soft_cap: float | None
    embedding_scale: float
    tied: bool
    qk_norms: bool
    post_norms: bool
    biased_roles: tuple[str, ...]
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int, ...]


def settings_of(base: BaseModel) -> DecoderSettings:
    """Read the settings of a base.

    Raises:
        CheckpointError: its configuration has a setting that the decoder does not support; the message names it.
    """
    config, family, dims, ref = base.config, base.family, base.dims, base.ref
    kinds = read_layer_kinds(config, family.name, dims.layers, ref)
    per_kind = read_ropes(config, family.name, dims, ref)
    missing = sorted(set(kinds) - set(per_kind))
    if missing:
        msg = f"{ref}: rope_parameters has no entry for {missing[0]} layers; wanted one for each kind of layer"
        raise CheckpointError(msg)
    ropes = tuple(dict.fromkeys(per_kind[kind] for kind in kinds))
    gemma = family.name in _GEMMA
    scalar = _number(config, "query_pre_attn_scalar", _QUERY_PRE_ATTN_SCALAR, ref) if gemma else dims.head_dim
    return DecoderSettings(
        **asdict(dims),
        eps=_number(config, "rms_norm_eps", _EPS.get(family.name, 1e-6), ref),
        activation=_activation(config, gemma, ref),
        attn_scale=scalar**-0.5,
        attn_soft_cap=_cap(config, "attn_logit_softcapping", _ATTN_SOFT_CAP[family.name], ref)
        if family.name in _ATTN_SOFT_CAP
        else None,
        final_soft_cap=_cap(config, "final_logit_softcapping", _FINAL_SOFT_CAP.get(family.name), ref)
        if gemma
        else None,
        embedding_scale=math.sqrt(dims.hidden) if gemma else 1.0,
        tied=family.is_tied(config),
        qk_norms=bool(family.head_norms),
        post_norms=bool(family.norm_out),
        biased_roles=family.biased_roles(config),
        windows=layer_windows(kinds, config, family.name, ref),
        ropes=ropes,
        layer_ropes=tuple(ropes.index(per_kind[kind]) for kind in kinds),
    )


def _activation(config: Mapping[str, Any], gemma: bool, ref: str) -> str:
    key, default = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    name = config.get(key) or default
    if name not in _ACTIVATIONS:
        msg = f"{ref}: {key} {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        raise CheckpointError(msg)
    return _ACTIVATIONS[name]


def _cap(config: Mapping[str, Any], key: str, default: float | None, ref: str) -> float | None:
    return None if config.get(key, default) is None else _number(config, key, default, ref)


def _number(config: Mapping[str, Any], key: str, default: float | None, ref: str) -> float:
    value = config.get(key, default)
    # An integer of 400 digits compares below infinity, but is too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        msg = f"{ref}: {key} is {str(value)[:60]!r}, wanted a positive number"
        raise CheckpointError(msg)
    return float(value)


_WINDOW = 4096  # default of the configuration classes
_PERIOD = {"gemma2": 2, "gemma3_text": 6}  # the last layer of each period has full attention


def read_layer_kinds(config: Mapping[str, Any], family: str, layers: int, ref: str) -> tuple[str, ...]:
    """Return (L,) "full_attention" or "sliding_attention".

    Raises:
        CheckpointError: `layer_types` has another kind or length, or contradicts the rest of the configuration.
    """
    implied = _implied_kinds(config, family, layers, ref)
    stated = config.get("layer_types")
    if stated is None:
        return implied
    if not isinstance(stated, list | tuple) or len(stated) != layers:
        msg = f"{ref}: layer_types is {stated!r}, wanted a list of {layers} kinds"
        raise CheckpointError(msg)
    unknown = [kind for kind in stated if kind not in (FULL, SLIDING)]
    if unknown:
        msg = f"{ref}: layer type {unknown[0]!r} is not supported; supported: {FULL}, {SLIDING}"
        raise CheckpointError(msg)
    # transformers ignores the list for these families and uses sliding_window alone.
    if family in ("mistral", "phi3", "llama") and tuple(stated) != implied:
        msg = f"{ref}: layer_types of a {family} model contradict its sliding_window"
        raise CheckpointError(msg)
    return tuple(stated)


def layer_windows(kinds: tuple[str, ...], config: Mapping[str, Any], family: str, ref: str) -> tuple[int | None, ...]:
    """Return (L,) the number of positions that each layer sees, its own included; None for full attention.

    Raises:
        CheckpointError: the window is not a positive integer, or a sliding layer has none.
    """
    window = _read_window(config, family, ref)
    if window is None and SLIDING in kinds:
        msg = f"{ref}: layer {kinds.index(SLIDING)} has sliding attention, but no sliding_window is set or in use"
        raise CheckpointError(msg)
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _read_window(config: Mapping[str, Any], family: str, ref: str) -> int | None:
    if family == "llama" or (family in ("qwen2", "qwen3") and not config.get("use_sliding_window")):
        return None
    window = config.get("sliding_window", None if family == "phi3" else _WINDOW)
    if window is not None and (type(window) is not int or window <= 0):
        msg = f"{ref}: sliding_window is {window!r}, wanted a positive integer or null"
        raise CheckpointError(msg)
    return window


def _implied_kinds(config: Mapping[str, Any], family: str, layers: int, ref: str) -> tuple[str, ...]:
    window = _read_window(config, family, ref)
    if family in _PERIOD:
        period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or _PERIOD[family]
        if type(period) is not int or period < 1:
            msg = f"{ref}: sliding_window_pattern is {period!r}, wanted a positive integer"
            raise CheckpointError(msg)
        return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))
    first = config.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
    if type(first) is not int:
        msg = f"{ref}: max_window_layers is {first!r}, wanted an integer"
        raise CheckpointError(msg)
    return tuple(SLIDING if window is not None and layer >= first else FULL for layer in range(layers))
