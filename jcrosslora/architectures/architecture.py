"""The architecture of one model: from its family and configuration to its layers, modules, names and shapes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jcrosslora.architectures.blocks import ROLES, Block, Experts, Mlp, PerLayerInput, Routing, SelfAttention, Tensor
from jcrosslora.architectures.family import Family
from jcrosslora.architectures.layer import Layer, layers_with
from jcrosslora.architectures.sizes import Dims, read_number


@dataclass(frozen=True, eq=False)
class Architecture:
    """The architecture of a model."""

    family: Family
    config: Mapping[str, Any]
    dims: Dims

    @cached_property
    def stack(self) -> tuple[Layer, ...]:
        """The layers.

        Raises:
            CheckpointError: a key that says which blocks layers have, or a size or number of these, cannot be read.
        """
        return tuple((self.family.layers or usual_layers)(self))

    def layers_with(self, name: str) -> tuple[int, ...]:
        """Return the layers that have a role, norm or tensor of this name."""
        return layers_with(self.stack, name)

    @cached_property
    def role_shapes(self) -> dict[str, tuple[int, int]]:
        """Role -> shape (O, I) of the linear modules of any layer, in the order of `ROLES`."""
        found = {role: shape for layer in dict.fromkeys(self.stack) for role, shape in layer.shapes.items()}
        return {role: found[role] for role in ROLES if role in found}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of any layer that is neither a module nor a norm nor of experts."""
        return {name: tensor for layer in dict.fromkeys(self.stack) for name, tensor in layer.tensors.items()}

    @cached_property
    def norms(self) -> dict[str, tuple[str, int]]:
        """Place -> path in a layer and features of each norm of any layer."""
        return {place: norm for layer in dict.fromkeys(self.stack) for place, norm in self.norms_of(layer)}

    def norms_of(self, layer: Layer) -> Iterator[tuple[str, tuple[str, int]]]:
        """Yield place, path in the layer and features of each norm of a layer, in the order of `Family.norms`."""
        held = layer.norm_sizes(self.dims.hidden).items()
        for name, path in self.family.layer_norms(self.config).items():
            yield from ((place, (path, size)) for place, (own, size) in held if own == name)

    @property
    def layer_inputs(self) -> int:
        """Features of the input that each layer has beside the stream, 0 for none."""
        return next((layer.last.features for layer in self.stack if isinstance(layer.last, PerLayerInput)), 0)


def attention(model: Architecture, **options: Any) -> SelfAttention:
    """Return the attention of a model, as its sizes and its family say but for some options."""
    dims, norm = model.dims, model.family.normed_heads(model.config)
    return replace(SelfAttention(dims.hidden, dims.heads, dims.kv_heads, dims.head_dim, norm), **options)


def mlp(model: Architecture) -> Mlp:
    """Return the dense MLP of a model."""
    return Mlp(model.dims.hidden, model.dims.intermediate, gated=model.family.gated)


def experts(model: Architecture) -> Experts:
    """Return the experts of a model, as its family reads them.

    Raises:
        CheckpointError: a size or a number is missing or out of range.
    """
    rules, config = model.family.experts, model.config
    assert rules is not None
    sizes, clamp, normalised = rules.sizes(config), rules.clamp, rules.normalised
    routing = Routing(
        count=sizes.number,
        used=sizes.used,
        scores=rules.scores_of(config),
        normalised=bool(config.get(normalised)) if isinstance(normalised, str) else normalised,
        sum_eps=rules.sum_eps,
        tolerance=None if rules.tolerance is None else read_number(config, rules.tolerance),
        scale=1.0 if rules.scale is None else read_number(config, rules.scale),
        scaled_inputs=rules.scaled_inputs,
        groups=sizes.groups,
        used_groups=sizes.used_groups,
        group_best=rules.group_best,
    )
    return Experts(
        model.dims.hidden,
        sizes.width,
        routing,
        tuple(rules.layouts[-1]),
        gated=rules.gated,
        clamp=clamp and (read_number(config, clamp[0]), read_number(config, clamp[1])),
        latent=sizes.latent,
        shared=rules.shared(config),
        shared_gate=rules.shared_gate,
        averaged=rules.averages(config),
    )


def usual_layers(model: Architecture, mixers: Sequence[Block] | None = None) -> list[Layer]:
    """Return layers of a mixer, by default attention, and of an MLP, or experts where the family says so."""
    count, rules = model.dims.layers, model.family.experts
    mixers = [attention(model)] * count if mixers is None else mixers
    sparse = [False] * count if rules is None else rules.layers(model.config, count)
    made = {False: None if all(sparse) else mlp(model), True: experts(model) if any(sparse) else None}
    return [Layer(mixer, made[flag]) for mixer, flag in zip(mixers, sparse, strict=True)]
