"""The record of a model family: its tensor names, constants, windows, positions and GGUF names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from jcrosslora.architectures.blocks import EMBEDDING, Block, Experts, HeadNorms, Mlp, SelfAttention
from jcrosslora.architectures.config import SLIDING, Number, number_keys
from jcrosslora.architectures.expert_rules import ExpertRules

# (configuration, kind of each layer) -> whether each layer has positions. It raises CheckpointError.
RotatedRule = Callable[[Mapping[str, Any], Sequence[str]], Sequence[bool]]


def windowed(_config: Mapping[str, Any], kinds: Sequence[str]) -> list[bool]:
    """Give positions to layers with windows, and none to layers of full attention."""
    return [kind == SLIDING for kind in kinds]


@dataclass(frozen=True)
class Windows:
    """Which layers have a sliding window.

    Attributes:
        size: default window size in tokens, the query's own included; `size_key` is its configuration key.
        chunked: whether texts are cut into chunks of this size, and a layer only sees the current chunk; `layer_types`
            then names it "chunked_attention".
        switch: configuration key that switches windows on; None if they are always on.
        period: the last layer of every `period` layers has full attention; None if all layers have windows.
        first: configuration key of the number of first layers without windows, and its default.
        which: "rotated" or "unrotated" if only layers with, or without, positions have windows.
        listed: whether `layer_types` is used; if not, it must not contradict the rest.
    """

    size: int | None = 4096
    size_key: str = "sliding_window"
    chunked: bool = False
    switch: str | None = None
    period: int | None = None
    period_keys: tuple[str, ...] = ()
    first: tuple[str, int] | None = None
    which: Literal["rotated", "unrotated"] | None = None
    listed: bool = True

    @property
    def keys(self) -> set[str]:
        """The configuration keys that this rule reads."""
        return {"layer_types", self.size_key, *self.period_keys, *([] if self.switch is None else [self.switch])}


@dataclass(frozen=True)
class Positions:
    """The rotary positions of a family, if they differ from Llama's.

    Attributes:
        local_theta: default base in layers with windows, if `rope_theta` and `rope_scaling` do not apply to them; else
            None. `local_theta_key` is its configuration key.
        settings: rope settings if the configuration states none.
        share: default share of a head's features that are rotated; None if it is always the whole head.
        interleaved: whether features 2i and 2i + 1 are rotated together, instead of i and i + pairs.
        rotated: returns which layers have positions; None if all have.
        types: rope types in addition to the common ones; `aliases` are other names of types.
        outer_original: default of `original_max_position_embeddings` if that is a key of the configuration itself.
        grows: whether queries grow with the position, by `llama_4_scaling_beta` of the rope settings.
        scales_unrotated: whether queries grow in layers without positions, by the configuration keys `attn_scale` and
            `floor_scale`, if `attn_temperature_tuning` is set.
    """

    theta: float = 10_000.0
    local_theta: float | None = None
    local_theta_key: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    share: float | None = None
    interleaved: bool = False
    rotated: RotatedRule | None = None
    types: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    outer_original: int | None = None
    grows: bool = False
    scales_unrotated: bool = False


@dataclass(frozen=True)
class StoredNames:
    """How files and the model class name tensors, where the two differ or the name is unusual.

    Attributes:
        embedding: the class's name of the embedding module.
        prefixes: prefix in files -> prefix in the class.
        modules: module of a layer in files -> in the class. Modules with the same name in the class are concatenated
            along rows, in this order.
    """

    embedding: str = EMBEDDING.removesuffix(".weight")
    prefixes: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)

    def tensor_prefixes(self) -> dict[str, str]:
        """Map prefixes in files and in the class to the package's prefixes; empty if all names are the same.

        The first match applies.
        """
        found, known, own = dict(self.prefixes), EMBEDDING.removesuffix("weight"), f"{self.embedding}."
        if own != known:
            named = {stored + own.removeprefix(new) for stored, new in found.items() if own.startswith(new)}
            found = dict.fromkeys((own, *sorted(named)), known) | found
        return found | {"": ""} if found else {}


# (metadata of a file, by key without the architecture; layers that hold each tensor, by its name in a layer) ->
# configuration. It raises CheckpointError for metadata that it cannot read.
GgufSettings = Callable[[Mapping[str, Any], Mapping[str, frozenset[int]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp's converter stores models of a family.

    Attributes:
        expert_architecture: `general.architecture` of models with experts, if it differs.
        permuted: whether the rows of q and k are in the order of llama.cpp's rotation, see `unpermuted_rows`.
        names: place in `Family.norms` -> name of the tensor, if it is not the usual one.
        final_norm: name of the tensor of the norm before the output head.
        tiled: whether heads of values of the delta rule take turns by their groups.
        tensors: tensor of a layer -> its name in a layer of the model, for tensors that are not a whole matrix of the
            family, a norm or a tensor of experts. Those with the same name are concatenated along rows, in this order.
        counts: configuration key -> metadata key of an integer.
        numbers: configuration key -> metadata key of a number.
        implied: configuration keys and values that files do not state.
        rope: settings of a scaled rotation that files do not state.
        arrays: one-number tensor of a layer -> key, without the architecture, of the list with one number per layer.
        settings: returns the remaining configuration keys.
        read_as_other: whether files are read as another family of the same architecture that computes the same;
            adapters are read and written for both.
    """

    architecture: str
    expert_architecture: str | None = None
    permuted: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    final_norm: str = "output_norm"
    tiled: bool = False
    tensors: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, str] = field(default_factory=dict)
    settings: GgufSettings | None = None
    read_as_other: bool = False

    @property
    def architectures(self) -> tuple[str, ...]:
        """`general.architecture` of models without and with experts; a single entry if they are the same."""
        return tuple(dict.fromkeys((self.architecture, self.expert_architecture or self.architecture)))


def yarn(factor: float, original: int, theta: float, **others: Any) -> dict[str, Any]:
    """Return the rope settings of a family that uses YaRN if the configuration states none."""
    lengths = {"rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    return {"rope_type": "yarn", **lengths, "beta_fast": 32.0, "beta_slow": 1.0, **others}


PRE_NORMS = {"attn": "input_layernorm", "mlp": "post_attention_layernorm"}
POST_NORMS = {"attn_post": "post_attention_layernorm", "mlp_post": "post_feedforward_layernorm"}
QK_NORMS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
_EPS, _POSITIONS, _STORED = Number("rms_norm_eps", 1e-6), Positions(), StoredNames()
_WIDTH = "intermediate_size"


@dataclass(frozen=True)
class Family:
    """One decoder architecture. The defaults are those of Llama.

    Attributes:
        architectures: class names that its configuration may state.
        layers: returns the layers of an `Architecture`; None for attention and an MLP or experts in every layer, see
            `architecture.usual_layers`.
        blocks: block classes in addition to the common ones (`all_blocks`).
        gated: whether its dense MLP has a gate.
        width_key: configuration key of the dense MLP's width; `intermediate_size` is used if it is not stated.
        experts: rules of the layers with experts instead of one MLP, if there are any.
        resolve: adds to a configuration the keys that other keys imply and that the rules read. Idempotent.
        fused: module as the model stores it -> the roles that it holds as row slices, in row order. A module with one
            role is renamed, relative to `ROLE_PATHS`.
        norms: norms of a layer: "attn" and "mlp" before attention and MLP, "attn_post" and "mlp_post" after them,
            "q" and "k" of queries and keys, and those inside other blocks (`Block.norms`).
        stored: unusual names of common modules and tensors, in files and in the class.
        norm: "rms", or "layer", which subtracts the mean first.
        rms_key: configuration key of the epsilon of RMS norms; if it is stated, norms are "rms" in spite of `norm`.
        gain_offset: the gain of a norm is this plus its weight (1 for Gemma).
        qk_norms: how queries and keys are normalised, if `norms` has "q" and "k" or their norms have no gain.
        qk_norm_key: configuration key that switches these norms on; None if they are always on.
        parallel: whether attention and MLP read the same normed input, and both are added to it.
        biases: roles that always have a bias.
        bias_keys: configuration key -> roles that have a bias if it is true.
        head_bias: whether the output head has a bias; or the configuration key for it.
        tied: whether the head is tied to the embedding if the configuration does not say.
        activation: the default activation.
        activation_key: configuration key of the activation.
        activation_tensors: one-number tensors of a layer that the activation reads -> default if a checkpoint omits it;
            None if it is required.
        eps: added to the mean square in every norm.
        attn_scale: factor on the attention scores; None is head size ** -0.5.
        embedding_scale: factor on the embedding; None is 1.
        residual_scale: factor on what attention and MLP add to the residual stream; None is 1.
        logit_scale: factor on the logits; None is 1.
        input_factors: role -> factor on a module's input, if it is not 1.
        output_factors: role -> factor on a module's output, if it is not 1.
        attn_soft_cap: soft cap of the attention scores, if any.
        final_soft_cap: soft cap of the logits, if any.
        windows: which layers have sliding windows; None if no layer has.
        gguf: its form in GGUF files; None if these cannot be read.
        keys: configuration keys to accept besides `COMMON_KEYS`, `HARMLESS_KEYS` and the keys that other fields name,
            see `known_keys`.
        fixed: configuration key -> values that do not change the meaning of the weights; others are refused.
        defaults: values of keys that a configuration may omit.
    """

    name: str
    architectures: tuple[str, ...]
    layers: Callable[[Any], Sequence[Any]] | None = None
    blocks: tuple[type[Block], ...] = ()
    gated: bool = True
    width_key: str = _WIDTH
    experts: ExpertRules | None = None
    resolve: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    final_norm: str = "model.norm"
    stored: StoredNames = _STORED
    norm: Literal["rms", "layer"] = "rms"
    rms_key: str | None = None
    norm_biases: bool = False
    gain_offset: float = 0.0
    qk_norms: HeadNorms = "head"
    qk_norm_key: str | None = None
    parallel: bool = False
    biases: tuple[str, ...] = ()
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_bias: bool | str = False
    tied: bool = False
    activation: str = "silu"
    activation_key: str = "hidden_act"
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

    @cached_property
    def known_keys(self) -> frozenset[str]:
        """The configuration keys that its rules read, and `keys`."""
        one = (self.activation_key, self.width_key, self.rms_key, self.qk_norm_key, self.head_bias)
        found = {key for key in one if isinstance(key, str)} | {*self.bias_keys, *number_keys(self), *self.keys}
        found |= {"partial_rotary_factor"} if self.positions.share else set()
        return frozenset(found.union(*(rule.keys for rule in (self.windows, self.experts) if rule is not None)))

    @property
    def all_blocks(self) -> tuple[type[Block], ...]:
        """The classes of blocks that its layers may have."""
        return (SelfAttention, Mlp, *([] if self.experts is None else [Experts]), *self.blocks)

    @property
    def own_embedding(self) -> str | None:
        """The class's name of the embedding, None if it is the usual one."""
        return None if f"{self.stored.embedding}.weight" == EMBEDDING else self.stored.embedding

    def biased_roles(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the roles that have a bias in a model of this configuration."""
        switched = (role for key, roles in self.bias_keys.items() if config.get(key) for role in roles)
        return tuple(dict.fromkeys((*self.biases, *switched)))

    def has_head_bias(self, config: Mapping[str, Any]) -> bool:
        """Whether the output head has a bias in a model of this configuration."""
        return bool(config.get(self.head_bias)) if isinstance(self.head_bias, str) else self.head_bias

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the output head is tied to the embedding in a model of this configuration."""
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

    def normed_heads(self, config: Mapping[str, Any]) -> HeadNorms | None:
        """Return `qk_norms` of a model of this configuration; None if queries and keys are not normalised."""
        if self.qk_norms == "unit":
            return self.qk_norms if self.qk_norm_key is None or config.get(self.qk_norm_key) else None
        return self.qk_norms if "q" in self.layer_norms(config) else None
