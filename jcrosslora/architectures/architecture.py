"""The architecture of a model, from its family and configuration: its layers, their modules, names and shapes.

A layer is a sequence of blocks whose outputs are added to the residual stream.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import jax

from jcrosslora.architectures.blocks import (
    INPUT_SITES,
    LINEARS,
    ROLES,
    Block,
    Experts,
    Link,
    Mlp,
    MlpAndExperts,
    PerLayerInput,
    SelfAttention,
    Tensor,
)
from jcrosslora.architectures.config import Dims
from jcrosslora.architectures.family import Family
from jcrosslora.architectures.run import BlockSettings, Context, KeysValues, KVCache, LayerCapture, LayerWeights, Run

STREAM_NORMS = ("attn", "attn_post", "mlp", "mlp_post")
GGUF_NORMS = {"attn": "attn_norm", "attn_post": "post_attention_norm", "mlp": "ffn_norm", "mlp_post": "post_ffw_norm"}


@dataclass(frozen=True)
class Layer:
    """The parts of a layer; hashable, and static under jit. Equal layers share one program.

    Attributes:
        mixer: the block that mixes positions; None in a layer that is only an MLP.
        mlp: the MLP or the experts; None in a layer without.
        last: a step after the MLP, or None.
        norms: places of `STREAM_NORMS` (before and after mixer and MLP) where the layer may have a norm; it has one if
            the family names it too.
        scaled: whether the residual stream is multiplied by a number after the layer.
    """

    mixer: Block | None
    mlp: Block | None = None
    last: Block | None = None
    norms: tuple[str, ...] = STREAM_NORMS
    scaled: bool = False

    sites: ClassVar = INPUT_SITES  # role -> what names its input in `LayerCapture.inputs`

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.mixer, self.mlp, self.last, self.norms, self.scaled))

    def __getstate__(self) -> dict[str, Any]:
        # Leave out cached values: the hash of a string differs between processes.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def blocks(self) -> Iterator[Block]:
        """The blocks, in the order in which they run."""
        return (block for block in (self.mixer, self.mlp, self.last) if block is not None)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Role -> (O, I) of the linear modules."""
        return {role: shape for block in self.blocks for role, shape in block.shapes().items()}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, except modules, norms and tensors of experts."""
        found = {name: tensor for block in self.blocks for name, tensor in block.tensors().items()}
        return found | ({"layer_scale": Tensor("layer_scalar", (1,))} if self.scaled else {})

    def norm_sizes(self, hidden: int) -> dict[str, tuple[str, int]]:
        """Return place -> (name in `Family.norms`, features) of the norms that the layer may have."""
        held = {"attn": self.mixer, "attn_post": self.mixer, "mlp": self.mlp, "mlp_post": self.mlp}
        of_stream = {place: (place, hidden) for place in self.norms if held[place] is not None}
        return of_stream | {
            place: (norm.name, norm.size) for block in self.blocks for place, norm in block.norms().items()
        }

    @property
    def rotated_size(self) -> int | None:
        """Features of a head that may be rotated; None in a layer without attention."""
        return next((block.rotated_size for block in self.blocks if block.rotated_size is not None), None)

    @cached_property
    def names(self) -> frozenset[str]:
        """The roles, places of norms and names of tensors that the layer may have."""
        held = frozenset().union(*(block.names for block in self.blocks))
        return held | self.norm_sizes(0).keys() | self.tensors.keys()

    def states(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        """Return the shapes of the layer's cache, see `Block.states`."""
        return {kind: one for block in self.blocks for kind, one in block.states(batch, length, dtype).items()}

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of state that the layer caches."""
        return tuple(self.states(1, 1, "float32"))

    @property
    def experts(self) -> Experts | None:
        """Its experts, None if it has none."""
        inner = self.mlp.experts if isinstance(self.mlp, MlpAndExperts) else self.mlp
        return inner if isinstance(inner, Experts) else None

    @property
    def recurrent(self) -> bool:
        """Whether it keeps a state other than keys and values."""
        return not all(isinstance(state, KeysValues) for state in self.states(1, 1, "float32").values())


def layers_with(layers: Sequence[Layer], name: str) -> tuple[int, ...]:
    """Return the layers that may have a role, norm or tensor of this name."""
    return tuple(number for number, layer in enumerate(layers) if name in layer.names)


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
            CheckpointError: a configuration key that decides the blocks of layers, or their sizes, cannot be read.
        """
        return tuple((self.family.layers or usual_layers)(self))

    @cached_property
    def role_shapes(self) -> dict[str, tuple[int, int]]:
        """Role -> shape (O, I) of the linear modules of any layer, in the order of `ROLES`."""
        found = {role: shape for layer in dict.fromkeys(self.stack) for role, shape in layer.shapes.items()}
        return {role: found[role] for role in ROLES if role in found}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of any layer, except modules, norms and tensors of experts."""
        return {name: tensor for layer in dict.fromkeys(self.stack) for name, tensor in layer.tensors.items()}

    @cached_property
    def norms(self) -> dict[str, tuple[str, int]]:
        """Place -> (path in a layer, features) of each norm of any layer."""
        return {place: norm for layer in dict.fromkeys(self.stack) for place, norm in self.norms_of(layer)}

    def norms_of(self, layer: Layer) -> Iterator[tuple[str, tuple[str, int]]]:
        """Yield (place, (path in the layer, features)) of each norm of a layer, in the order of `Family.norms`."""
        held = layer.norm_sizes(self.dims.hidden).items()
        for name, path in self.family.layer_norms(self.config).items():
            yield from ((place, (path, size)) for place, (own, size) in held if own == name)

    def stream_norm(self, role: str, layer: int) -> str | None:
        """Return the norm between the residual stream and a module of a layer, None if there is none.

        That is the norm before a module that reads the stream, and the norm after one that writes to it.
        """
        place = LINEARS[role].norm
        place = "attn" if place == "mlp" and self.family.parallel else place
        return self.family.norms.get(place) if place is not None and place in self.stack[layer].names else None

    def links(self, layer: int) -> list[Link]:
        """Return the links of a layer, those from norms and tensors first, with one link for all readers of a norm."""
        own = self.stack[layer]
        places = {"mlp": "attn"} if self.family.parallel else {}
        gains = {place for place, _ in self.norms_of(own)} | own.tensors.keys()
        readers: dict[str, tuple[str, ...]] = {}
        others = []
        for link in (link for block in own.blocks for link in block.links()):
            writer = places.get(link.writer, link.writer)
            if writer in gains and link.rows is None:
                readers[writer] = (*readers.get(writer, ()), *link.readers)
            elif writer in gains or writer not in STREAM_NORMS:
                others.append(link)
        others.sort(key=lambda link: link.writer not in gains)
        return [*(Link(writer, found) for writer, found in readers.items()), *others]

    @property
    def layer_inputs(self) -> int:
        """Features of the per-layer input, 0 for none."""
        return next((layer.last.features for layer in self.stack if isinstance(layer.last, PerLayerInput)), 0)


def attention(model: Architecture, **options: Any) -> SelfAttention:
    """Return the attention block of a model; options override its sizes and family settings."""
    dims, norm = model.dims, model.family.normed_heads(model.config)
    return replace(SelfAttention(dims.hidden, dims.heads, dims.kv_heads, dims.head_dim, norm), **options)


def mlp(model: Architecture) -> Mlp:
    """Return the dense MLP of a model."""
    return Mlp(model.dims.hidden, model.dims.intermediate, gated=model.family.gated)


def experts(model: Architecture) -> Experts:
    """Return the experts of a model; its family must have some. See `ExpertRules.block`."""
    assert model.family.experts is not None
    return model.family.experts.block(model.config, model.dims.hidden)


def usual_layers(model: Architecture, mixers: Sequence[Block] | None = None) -> list[Layer]:
    """Return layers with a mixer, by default attention, and an MLP, or experts if the family has them."""
    count, rules = model.dims.layers, model.family.experts
    mixers = [attention(model)] * count if mixers is None else mixers
    sparse = [False] * count if rules is None else rules.layers(model.config, count)
    made = {False: None if all(sparse) else mlp(model), True: experts(model) if any(sparse) else None}
    return [Layer(mixer, made[flag]) for mixer, flag in zip(mixers, sparse, strict=True)]


def layer_forward(
    settings: BlockSettings, weights: LayerWeights, context: Context, x: jax.Array, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None, LayerCapture]:
    """Run a layer on the residual stream x (B, T, H).

    Returns:
        The residual stream after the layer, the cache with the layer's new state, and the captures.
    """
    own, capture = weights.own, LayerCapture(weights.layer, {}, {}, x)
    assert isinstance(own, Layer)
    run = Run(settings, weights, context, capture, x)
    normed = run.norm("attn", x)
    if own.mixer is not None:
        mixed, cache = own.mixer.forward(run, normed, cache)
        x = x + run.added("attn_post", mixed)
        run = replace(run, stream=x)
    if own.mlp is not None:
        normed = normed if settings.parallel else run.norm("mlp", x)
        x = x + run.added("mlp_post", own.mlp.forward(run, normed, None)[0])
    if own.last is not None:
        x = x + own.last.forward(replace(run, stream=x), x, None)[0]
    if own.scaled:
        x = x * weights.tensors["layer_scale"].astype(x.dtype)
    return x, cache, LayerCapture(weights.layer, capture.inputs, capture.outputs, x)
