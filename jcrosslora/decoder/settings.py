"""Read the settings of a forward pass from a configuration; they are hashable, and static under jit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jcrosslora.checkpoint import BaseModel, Dims, Family
from jcrosslora.checkpoint.config import read_number
from jcrosslora.checkpoint.family.mixers import Mixer
from jcrosslora.checkpoint.family.parts import LayerParts, layers_with
from jcrosslora.checkpoint.family.rules import HeadSizes, LatentSizes, Number
from jcrosslora.decoder.experts.settings import ExpertSettings, expert_settings
from jcrosslora.decoder.layer_kinds import layer_windows, read_layer_kinds, rotated_layers
from jcrosslora.decoder.rope_scaling import Rope
from jcrosslora.decoder.rope_settings import read_ropes, unrotated, unrotated_growth
from jcrosslora.errors import CheckpointError

# Name in configurations -> name in `ops.ACTIVATIONS`.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class RoleFactors:
    """Factors on what modules read and return, of roles whose factor is not 1.

    Attributes:
        inputs: role and factor.
        outputs: role and factor.
    """

    inputs: tuple[tuple[str, float], ...] = ()
    outputs: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class DecoderSettings(Dims):
    """The settings of one model's forward pass, beside its sizes.

    Attributes:
        eps: added to the mean square in every norm.
        layer_norm: whether norms subtract the mean first.
        activation: a name of `ops.ACTIVATIONS`.
        attn_scale: factor on the attention scores.
        attn_soft_cap: soft cap of the attention scores, or None.
        final_soft_cap: soft cap of the logits, or None.
        embedding_scale: factor on the embedding.
        residual_scale: factor on what attention and MLP add to the residual stream.
        logit_scale: factor on the logits.
        tied: whether the head is the embedding.
        qk_norms: how queries and keys are normalised, see `Family.qk_norms`; None if they are not.
        post_norms: whether the outputs of attention and MLP are normalised before they are added, in some layers at
            least, see `normed_behind`.
        parallel: whether attention and MLP read the same normed input.
        interleaved: whether neighbouring features are rotated together.
        biased_roles: roles with a bias.
        windows: (L,) number of visible positions of a layer, its own included; None for all.
        chunked_windows: whether these positions are those of a chunk of that number, instead of the last ones.
        ropes: the different rotary settings.
        layer_ropes: (L,) index into `ropes`.
        parts: (L,) mixer and MLP of a layer.
        mixer: what mixes tokens in layers without attention, or beside it; None if all have attention alone.
        role_factors: on what modules read and return.
        experts: of the layers that have experts; None without any.
        latent: sizes of latent attention; None without it.
        global_heads: heads of layers whose mixer is "global_attention" or its like; None without any.
        value_norm: whether the heads of values are normalised, without a gain.
        layer_inputs: features of the input that each layer has beside the stream, 0 for none.
    """

    eps: float
    layer_norm: bool
    activation: str
    attn_scale: float
    attn_soft_cap: float | None
    final_soft_cap: float | None
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    tied: bool
    qk_norms: str | None
    post_norms: bool
    parallel: bool
    interleaved: bool
    biased_roles: tuple[str, ...]
    windows: tuple[int | None, ...]
    chunked_windows: bool
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int, ...]
    parts: tuple[LayerParts, ...]
    mixer: Mixer | None
    role_factors: RoleFactors
    experts: ExpertSettings | None = None
    latent: LatentSizes | None = None
    global_heads: HeadSizes | None = None
    value_norm: bool = False
    layer_inputs: int = 0

    def layers_with(self, name: str) -> tuple[int, ...]:
        """Return the layers that have a role, norm, tensor or part of this name."""
        return layers_with(self.parts, name)

    def normed_behind(self, layer: int) -> bool:
        """Whether what the MLP of a layer returns is normalised before it is added to the stream."""
        return self.post_norms and layer in self.layers_with("mlp_post")

    @property
    def shares_keys(self) -> bool:
        """Whether layers read the keys and values of a layer before."""
        return any("kv_shared" in parts.mixer for parts in self.parts)

    def heads_of(self, mixer: str) -> HeadSizes:
        """Return the heads of a kind of attention, by its name in `PARTS`."""
        if self.global_heads is not None and mixer.startswith("global_"):
            return self.global_heads
        return HeadSizes(self.kv_heads, self.head_dim)

    def ropes_of(self, mixer: str) -> tuple[int, ...]:
        """Return the rotary settings of the layers with a mixer, as indices into `ropes`."""
        return tuple(sorted({self.layer_ropes[layer] for layer in self.layers_with(mixer)}))


def settings_of(base: BaseModel) -> DecoderSettings:
    """Read the settings of a base.

    Raises:
        CheckpointError: its configuration has a setting that the decoder does not support; the message names it.
    """
    config, family, dims, ref = base.config, base.family, base.dims, base.ref

    def factor(number: Number | None, usual: float = 1.0) -> float:
        return usual if number is None else read_number(config, number, ref)

    kinds = read_layer_kinds(config, family, dims.layers, ref)
    norm, eps = family.norm_of(config)
    norms, layer_ropes = family.layer_norms(config), _layer_ropes(base, kinds)
    ropes = tuple(dict.fromkeys(layer_ropes))
    latent = None if family.latent is None else family.latent(config)
    return DecoderSettings(
        **asdict(dims),
        eps=read_number(config, eps, ref),
        layer_norm=norm == "layer",
        activation=_activation(config, family, ref),
        attn_scale=factor(family.attn_scale, dims.head_dim**-0.5) if latent is None else _latent_scale(latent, ropes),
        attn_soft_cap=_cap(config, family.attn_soft_cap, ref),
        final_soft_cap=_cap(config, family.final_soft_cap, ref),
        embedding_scale=factor(family.embedding_scale),
        residual_scale=factor(family.residual_scale),
        logit_scale=factor(family.logit_scale),
        tied=family.is_tied(config),
        qk_norms=family.normed_heads(config),
        post_norms="mlp_post" in norms,
        parallel=family.parallel,
        interleaved=family.positions.interleaved,
        biased_roles=family.biased_roles(config),
        windows=layer_windows(kinds, config, family, ref),
        chunked_windows=family.windows is not None and family.windows.chunked,
        ropes=ropes,
        layer_ropes=tuple(map(ropes.index, layer_ropes)),
        parts=base.parts,
        mixer=family.mixer_of(config),
        role_factors=RoleFactors(
            *(
                tuple((role, found) for role, number in named.items() if (found := factor(number)) != 1.0)
                for named in (family.input_factors, family.output_factors)
            )
        ),
        experts=expert_settings(family.experts, config, ref) if layers_with(base.parts, "router") else None,
        latent=latent,
        global_heads=None if family.global_heads is None else family.global_heads(config),
        value_norm=family.value_norm,
        layer_inputs=family.layer_inputs(config),
    )


def _layer_ropes(base: BaseModel, kinds: tuple[str, ...]) -> list[Rope]:
    per_kind = read_ropes(base.config, base.family, base.dims, base.ref)
    missing = sorted(set(kinds) - set(per_kind))
    if missing:
        msg = f"{base.ref}: rope_parameters has no entry for {missing[0]} layers; wanted one for each kind of layer"
        raise CheckpointError(msg)
    rotated = rotated_layers(kinds, base.config, base.family, base.ref)
    growth = unrotated_growth(base.config, base.family, base.ref)
    return [
        per_kind[kind] if turns else unrotated(per_kind[kind], growth)
        for kind, turns in zip(kinds, rotated, strict=True)
    ]


def _latent_scale(latent: LatentSizes, ropes: tuple[Rope, ...]) -> float:
    return (latent.plain + latent.rotated) ** -0.5 * ropes[0].latent_scale


def _activation(config: Mapping[str, Any], family: Family, ref: str) -> str:
    key = family.activation_key
    name = config.get(key) or family.activation
    name = family.activation_aliases.get(name, name)
    # Others than its own would not read the tensors that the family has for it.
    own = {family.activation: family.activation} if family.activation_tensors else _ACTIVATIONS
    if name not in own:
        msg = f"{ref}: {key} {name!r} is not supported; supported: {', '.join(own)}"
        raise CheckpointError(msg)
    return own[name]


def _cap(config: Mapping[str, Any], number: Number | None, ref: str) -> float | None:
    if number is None or config.get(number.key, number.default) is None:
        return None
    return read_number(config, number, ref)
