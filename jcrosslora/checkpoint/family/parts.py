"""What a layer consists of: what mixes its positions, and its MLP. Both may differ from layer to layer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jcrosslora.checkpoint.family.names import (
    ATTENTION,
    CONVOLUTION,
    DELTA,
    GATED_ATTENTION,
    GROUPED_DELTA,
    LATENT,
    MAMBA,
    MLP,
    SHARED,
)


class LayerParts(NamedTuple):
    """The names, in `PARTS`, of a layer's mixer and of its MLP."""

    mixer: str = "attention"
    mlp: str = "dense"


_ATTENTION = frozenset({*ATTENTION, *GATED_ATTENTION, "q", "k", "sinks"})
_RECURRENCE = {"conv", "conv_bias", "A_log", "dt_bias", "norm"}
_MAMBA = frozenset({*MAMBA, *_RECURRENCE, "D", "mamba_out_bias"})
# Of the experts of a layer, see `Experts.layouts`.
EXPERT_TENSORS = ("router", "router_bias", "correction", "gate_up", "down", "gate_up_bias", "down_bias")
# Part -> the roles, the norms (by their place in `Family.norms`) and the tensors (by their name in
# `Family.layer_tensors`) that only layers with this part, or another that lists them, may have.
PARTS: Mapping[str, frozenset[str]] = {
    "attention": _ATTENTION,
    "latent_attention": frozenset({*LATENT, "o_proj", "q_a", "kv_a"}),
    "direct_latent_attention": frozenset({*LATENT[2:], "q_proj", "o_proj", "kv_a"}),
    "convolution": frozenset({*CONVOLUTION, "conv", "conv_bias"}),
    "delta": frozenset({*DELTA, *GROUPED_DELTA, *_RECURRENCE}),
    "mamba": _MAMBA,
    "attention and mamba": _ATTENTION | _MAMBA,
    "dense": frozenset(MLP),
    "experts": frozenset({*SHARED, "shared_expert_gate", *EXPERT_TENSORS}),
    "dense and experts": frozenset({*MLP, *EXPERT_TENSORS}),
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
