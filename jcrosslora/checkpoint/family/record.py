"""The record of one architecture: names of its tensors, its numbers, and its configuration keys."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jcrosslora.checkpoint.family.experts import Experts
from jcrosslora.checkpoint.family.mixers import Mixer
from jcrosslora.checkpoint.family.names import (
    DENSE_ROLES,
    EMBEDDING,
    EXPERT_LATENT,
    LATENT_INNER,
    MIXER_WRITERS,
    MLP,
    MLP_WRITERS,
    PER_LAYER,
    ROLES,
    SHARED,
    WIDE_MLP,
)
from jcrosslora.checkpoint.family.parts import LayerParts, holds
from jcrosslora.checkpoint.family.rules import (
    Gguf,
    HeadSizes,
    LatentSizes,
    LayerTensor,
    Number,
    Positions,
    RoleShape,
    Windows,
)

PRE_NORMS = {"attn": "input_layernorm", "mlp": "post_attention_layernorm"}
POST_NORMS = {"attn_post": "post_attention_layernorm", "mlp_post": "post_feedforward_layernorm"}
QK_NORMS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
_EPS, _POSITIONS = Number("rms_norm_eps", 1e-6), Positions()
_WIDTH = "intermediate_size"


@dataclass(frozen=True)
class Family:
    """One architecture of decoders. The defaults are those of Llama.

    Attributes:
        name: the `model_type` of its configuration.
        architectures: accepted values in `architectures`.
        roles: the linear modules of any layer, in the order of `ROLES`; an MLP without a gate lacks "gate_proj".
        parts: from a configuration and the number of layers, the parts of each layer; None for attention and a dense
            MLP in all. A layer has those of the roles, norms and tensors that its parts may have (`parts.holds`).
        shapes: role -> shape (O, I), of roles that `layout.role_shapes` does not know or of another shape than there.
        width_key: configuration key of the width of a dense MLP, which is `intermediate_size` where it is not stated.
        latent: from a configuration, the sizes of latent attention; None where no layer has it.
        global_heads: from a configuration, the heads of layers of "global_attention" and its like.
        value_norm: whether the heads of values are normalised, without a gain.
        layer_inputs: from a configuration, the features of the input that each layer has beside the stream, of an
            embedding of its own and of the stream before the first layer; 0 for none.
        experts: of the layers with experts in place of one MLP, if there are any.
        tensors: name -> tensor of a layer that is neither a linear module nor a norm, beside those of `mixer`.
        resolve: from a configuration to one that states what the other rules read, where some keys imply it. It takes
            its own result as it is.
        mixer: from a configuration to what mixes tokens beside attention; None if only attention does.
        fused: module as the model stores it -> the roles that it holds as row slices, in row order. A module whose
            name is not that of `ROLE_PATHS` holds one role.
        norms: norms of a layer. "attn" and "mlp" in front of attention and MLP, "attn_post" and "mlp_post" behind them,
            "q" and "k" of queries and keys ("global_q", "global_k" of those of `global_heads`); "mlp_alone" behind an
            MLP whose output is added to that of experts, "experts_in" and "experts_out" around these, all of them in
            front of "mlp_post"; "per_layer_out" behind the step with an input of the layer.
        final_norm: the norm in front of the output head.
        embedding: the module of the class that is the embedding.
        prefixes: of names in files -> of those in the class, where the two differ.
        file_modules: module of a layer in files -> in the class, where the two differ for another reason. Those of one
            name in the class hold its rows one behind another, in this order.
        norm: "rms", or "layer", which subtracts the mean first.
        rms_key: configuration key of the epsilon of norms that are "rms" where it is stated, whatever `norm` is.
        norm_biases: whether norms have a bias.
        gain_offset: the gain of a norm is this plus its weight (1 for Gemma).
        qk_norms: whether queries and keys are normalised for each head, for all heads together, or for each head behind
            the rotation, the last also without a gain ("unit", in layers with positions alone).
        qk_norm_key: configuration key without which they are not; None if they always are where there are norms "q" and
            "k".
        parallel: whether attention and MLP read the same normed input, and both are added to it.
        biases: roles that always have a bias.
        bias_keys: configuration key -> roles that have a bias if it is true.
        head_bias: whether the output head has a bias; or the configuration key that says so.
        tied: whether the head is the embedding if the configuration does not say.
        activation: default of the activation.
        activation_key: its configuration key.
        activation_aliases: name in configurations -> the activation that it stands for, where the two differ.
        activation_tensors: tensors of a layer that the activation reads, of one number each -> that number where a
            checkpoint leaves it out, None if it must not.
        eps: added to the mean square in every norm.
        attn_scale: factor on the attention scores; None is head size ** -0.5.
        embedding_scale: factor on the embedding; None is 1, as for the next two.
        residual_scale: factor on what attention and MLP add to the residual stream.
        logit_scale: factor on the logits.
        input_factors: role -> factor on what a module reads, of roles whose factor is not 1.
        output_factors: role -> factor on what a module returns, likewise.
        attn_soft_cap: soft cap of the attention scores, if any.
        final_soft_cap: soft cap of the logits, if any.
        windows: which layers have sliding windows; None if none has.
        positions: its rotary positions.
        gguf: its form in GGUF files; None if these cannot be read.
        keys: configuration keys that are understood beside `COMMON_KEYS` and `HARMLESS_KEYS`.
        fixed: configuration key -> values that do not change the meaning of the weights; others are refused.
        defaults: values of keys that a configuration may omit.
    """

    name: str
    architectures: tuple[str, ...]
    roles: tuple[str, ...] = DENSE_ROLES
    parts: Callable[[Mapping[str, Any], int], Sequence[LayerParts]] | None = None
    shapes: Mapping[str, RoleShape] = field(default_factory=dict)
    width_key: str = _WIDTH
    latent: Callable[[Mapping[str, Any]], LatentSizes] | None = None
    global_heads: Callable[[Mapping[str, Any]], HeadSizes] | None = None
    value_norm: bool = False
    layer_inputs: Callable[[Mapping[str, Any]], int] = lambda _: 0
    experts: Experts | None = None
    tensors: Mapping[str, LayerTensor] = field(default_factory=dict)
    resolve: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    mixer: Callable[[Mapping[str, Any]], Mixer] | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    final_norm: str = "model.norm"
    embedding: str = EMBEDDING.removesuffix(".weight")
    prefixes: Mapping[str, str] = field(default_factory=dict)
    file_modules: Mapping[str, str] = field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    rms_key: str | None = None
    norm_biases: bool = False
    gain_offset: float = 0.0
    qk_norms: Literal["head", "whole", "rotated", "unit"] = "head"
    qk_norm_key: str | None = None
    parallel: bool = False
    biases: tuple[str, ...] = ()
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_bias: bool | str = False
    tied: bool = False
    activation: str = "silu"
    activation_key: str = "hidden_act"
    activation_aliases: Mapping[str, str] = field(default_factory=dict)
    activation_tensors: Mapping[str, float | None] = field(default_factory=dict)
    eps: Number = _EPS
    attn_scale: Number | None = None
    embedding_scale: Number | None = None
    residual_scale: Number | None = None
    logit_scale: Number | None = None
    input_factors: Mapping[str, Number] = field(default_factory=dict)
    output_factors: Mapping[str, Number] = field(default_factory=dict)
    attn_soft_cap: Number | None = None
    final_soft_cap: Number | None = None
    windows: Windows | None = None
    positions: Positions = _POSITIONS
    gguf: Gguf | None = None
    keys: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def layer_parts(self, config: Mapping[str, Any], layers: int) -> tuple[LayerParts, ...]:
        """Return the parts of each layer of a model of this configuration.

        Raises:
            CheckpointError: a key that says which layers have which parts cannot be read.
        """
        return (LayerParts(),) * layers if self.parts is None else tuple(self.parts(config, layers))

    def mixer_of(self, config: Mapping[str, Any]) -> Mixer | None:
        """Return what mixes tokens beside attention in a model of this configuration.

        Raises:
            CheckpointError: a size is not a positive integer, or does not fit the others.
        """
        return None if self.mixer is None else self.mixer(config)

    def layer_tensors(self, config: Mapping[str, Any]) -> dict[str, LayerTensor]:
        """Return the tensors of layers that are neither linear modules nor norms, by their names in `PARTS`."""
        mixer = self.mixer_of(config)
        own = {} if mixer is None else mixer.tensors()
        return dict(self.tensors) | {
            name: LayerTensor(path, lambda *_, shape=shape: shape, exact=name not in ROLES)
            for name, (path, shape) in own.items()
        }

    @property
    def own_embedding(self) -> str | None:
        """The name that the class has for the embedding, None if it is the usual one."""
        return None if f"{self.embedding}.weight" == EMBEDDING else self.embedding

    def tensor_prefixes(self) -> dict[str, str]:
        """Return prefixes of names in files and in the class -> of those by which the package calls tensors.

        The first that matches applies; there are none where all names are the same.
        """
        found, known = dict(self.prefixes), EMBEDDING.removesuffix("weight")
        if self.own_embedding is not None:
            own = f"{self.own_embedding}."
            named = {stored + own.removeprefix(new) for stored, new in found.items() if own.startswith(new)}
            found = dict.fromkeys((own, *sorted(named)), known) | found
        return found | {"": ""} if found else {}

    def biased_roles(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the roles that have a bias in a model of this configuration."""
        switched = (role for key, roles in self.bias_keys.items() if config.get(key) for role in roles)
        return tuple(dict.fromkeys((*self.biases, *switched)))

    def has_head_bias(self, config: Mapping[str, Any]) -> bool:
        """Whether the output head has a bias in a model of this configuration."""
        return bool(config.get(self.head_bias)) if isinstance(self.head_bias, str) else self.head_bias

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the output head is the embedding in a model of this configuration."""
        return bool(config.get("tie_word_embeddings", self.tied))

    def width(self, config: Mapping[str, Any]) -> str:
        """Return the configuration key of the width of a dense MLP in a model of this configuration."""
        return self.width_key if config.get(self.width_key) is not None else _WIDTH

    def norm_of(self, config: Mapping[str, Any]) -> tuple[Literal["rms", "layer"], Number]:
        """Return `norm` and `eps` of a model of this configuration."""
        if self.rms_key is None or config.get(self.rms_key) is None:
            return self.norm, self.eps
        return "rms", Number(self.rms_key)

    def layer_norms(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return `norms` of a model of this configuration."""
        if self.qk_norm_key is None or config.get(self.qk_norm_key):
            return dict(self.norms)
        return {name: norm for name, norm in self.norms.items() if name not in QK_NORMS}

    def normed_heads(self, config: Mapping[str, Any]) -> str | None:
        """Return `qk_norms` of a model of this configuration; None if queries and keys are not normalised."""
        if self.qk_norms == "unit":
            return self.qk_norms if self.qk_norm_key is None or config.get(self.qk_norm_key) else None
        return self.qk_norms if "q" in self.layer_norms(config) else None

    def stream_norm(self, role: str, parts: LayerParts) -> str | None:
        """Return the norm between the residual stream and a module of a layer of these parts, None if there is none.

        For modules that read the stream it is the norm in front of them, for those that write to it the one behind.
        """
        place = self._stream_place(role)
        return self.norms.get(place) if place is not None and holds(parts, place) else None

    def _stream_place(self, role: str) -> str | None:
        """Return the place in `norms` of the norm between the stream and a role."""
        if role in LATENT_INNER:
            return None
        if role in PER_LAYER:
            return "per_layer_out" if role == "per_layer_projection" else None
        if role in (*MLP, *WIDE_MLP, *SHARED, "shared_expert_gate", *EXPERT_LATENT):
            return "mlp_post" if role in MLP_WRITERS else "attn" if self.parallel else "mlp"
        return "attn_post" if role in MIXER_WRITERS else "attn"
