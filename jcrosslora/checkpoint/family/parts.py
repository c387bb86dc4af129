"""What a layer consists of: what mixes its positions, its MLP, and what is behind it. All may differ between layers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jcrosslora.checkpoint.family.names import (
    ATTENTION,
    CONVOLUTION,
    DELTA,
    EXPERT_LATENT,
    GATED_ATTENTION,
    GLOBAL_ATTENTION,
    GROUPED_DELTA,
    LATENT,
    MAMBA,
    MLP,
    PER_LAYER,
    SEPARATE_DELTA,
    SHARED,
    WIDE_MLP,
)


class LayerParts(NamedTuple):
    """The names, in `PARTS`, of a layer's mixer, of its MLP, and of the step behind that; each may be "nothing"."""

    mixer: str = "attention"
    mlp: str = "dense"
    last: str = "nothing"


_ATTENTION = frozenset({*ATTENTION, *GATED_ATTENTION, "q", "k", "sinks"})
_RECURRENCE = {"conv", "conv_bias", "A_log", "dt_bias", "norm"}
_MAMBA = frozenset({*MAMBA, *_RECURRENCE, "D", "mamba_out_bias"})
_GLOBAL = frozenset({*GLOBAL_ATTENTION, "global_q", "global_k"})
# Norms and tensors of experts whose outputs are added to those of an MLP.
_BESIDE = frozenset({"mlp_alone", "experts_in", "experts_out", "router_scale", "expert_scale"})
# Of the experts of a layer, see `Experts.layouts`.
EXPERT_TENSORS = ("router", "router_bias", "correction", "gate_up", "down", "gate_up_bias", "down_bias")
_EXPERTS = frozenset({*SHARED, "shared_expert_gate", *EXPERT_TENSORS})
NOTHING = "nothing"  # a layer without mixer, without MLP, or without a step behind it
_DELTA = frozenset({*DELTA, *GROUPED_DELTA, *SEPARATE_DELTA, *_RECURRENCE})
_MIXERS: Mapping[str, frozenset[str]] = {
    "attention": _ATTENTION,
    "kv_shared_attention": frozenset({"kv_shared_q_proj", "o_proj", "q"}),
    "global_attention": _GLOBAL,
    "global_key_attention": _GLOBAL - {"global_v_proj"},  # the keys, before their norm, are the values
    "global_kv_shared_attention": frozenset({"global_kv_shared_q_proj", "global_o_proj", "global_q"}),
    "latent_attention": frozenset({*LATENT, "o_proj", "q_a", "kv_a"}),
    "direct_latent_attention": frozenset({*LATENT[2:], "q_proj", "o_proj", "kv_a"}),
    "convolution": frozenset({*CONVOLUTION, "conv", "conv_bias"}),
    "delta": _DELTA,
    "mamba": _MAMBA,
    "attention and mamba": _ATTENTION | _MAMBA,
}
_MLPS: Mapping[str, frozenset[str]] = {
    "dense": frozenset(MLP),
    "experts": _EXPERTS,
    "latent experts": _EXPERTS | {*EXPERT_LATENT},
    "routed experts": frozenset(EXPERT_TENSORS),  # without any that all tokens share
    "dense and experts": frozenset({*MLP, *EXPERT_TENSORS}),
    "wide": frozenset(WIDE_MLP),
    "dense beside experts": _BESIDE | {*MLP, *EXPERT_TENSORS},
    "wide beside experts": _BESIDE | {*WIDE_MLP, *EXPERT_TENSORS},
}
# Parts with a norm on one side alone, of families whose layers differ in that.
_ONE_NORM: Mapping[str, frozenset[str]] = {
    "attention, then norm": _ATTENTION | {"attn_post"},
    "norm, then delta": _DELTA | {"attn"},
    "dense, then norm": frozenset({*MLP, "mlp_post"}),
    "norm, then dense": frozenset({*MLP, "mlp"}),
}
# Part -> the roles, the norms (by their place in `Family.norms`) and the tensors (by their name in
# `Family.layer_tensors`) that only layers with this part, or another that lists them, may have.
PARTS: Mapping[str, frozenset[str]] = {
    **{name: own | {"attn", "attn_post"} for name, own in _MIXERS.items()},
    **{name: own | {"mlp", "mlp_post"} for name, own in _MLPS.items()},
    **_ONE_NORM,
    "per_layer_input": frozenset({*PER_LAYER, "per_layer_out"}),
    NOTHING: frozenset(),
}
_OWNED = frozenset().union(*PARTS.values())


def holds(parts: LayerParts, name: str) -> bool:
    """Whether a layer of these parts may have a role, norm or tensor of this name."""
    return name not in _OWNED or any(name in PARTS[part] for part in parts)


def layers_with(parts: Sequence[LayerParts], name: str) -> tuple[int, ...]:
    """Return the layers that may have a role, norm or tensor of this name, or that have a part of this name."""
    if name in PARTS:
        return tuple(layer for layer, own in enumerate(parts) if name in own)
    return tuple(layer for layer, own in enumerate(parts) if holds(own, name))
