"""The base class of blocks, and the plain blocks: a dense MLP, two mixers side by side, the input of a layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.architectures.ops import linear, rms_norm, rows_at
from jcrosslora.architectures.run import KVCache, Run


class Linear(NamedTuple):
    """A linear module that blocks of a class may have.

    Attributes:
        role: its name in `--roles`, in reports and among stacked weights; one role has one shape in a model.
        path: its logical name in a layer, the same in every family.
        site: name of its input. Modules of one site read the same array, and are in the same layers.
        norm: place of the norm between it and the residual stream; None if there is none.
        gguf: its name in a layer of a GGUF file; None if it has none.
        stream: whether it reads the residual stream, writes to it, or does neither.
    """

    role: str
    path: str
    site: str
    norm: str | None
    gguf: str | None = None
    stream: Literal["reads", "writes", "inside"] = "reads"


class Norm(NamedTuple):
    """A norm inside a block: its name in `Family.norms`, and how many features it normalises."""

    name: str
    size: int


class Tensor(NamedTuple):
    """A tensor that is neither a linear module nor a norm.

    Attributes:
        path: its name in a layer, e.g. "self_attn.sinks".
        exact: whether it is float32 in every forward pass, instead of the dtype of the weights.
    """

    path: str
    shape: tuple[int, ...]
    exact: bool = True


class Link(NamedTuple):
    """Features that readers get from a writer with nothing in between but a factor on each feature.

    Dividing the writer's rows or gains by a scale and multiplying the readers' columns by it leaves the model
    unchanged.

    Attributes:
        writer: place of a norm, name of a tensor, role of a module, or "gate_up" of experts.
        readers: roles of modules, or "router", "gate_up" and "down" of experts; all have columns for these features.
        rows: (I,), the writer's row of each column of the readers; None if they are equal.
    """

    writer: str
    readers: tuple[str, ...]
    rows: np.ndarray | None = None


class Block:
    """A block of a layer. Subclasses are frozen dataclasses whose fields are sizes and choices, static under jit."""

    # What blocks of this class may have: linear modules, and GGUF names by place of a norm.
    LINEARS: ClassVar[tuple[Linear, ...]] = ()
    GGUF_NORMS: ClassVar[Mapping[str, str]] = {}

    @property
    def parts(self) -> tuple["Block", ...]:
        """The blocks inside this one; it has all their modules, norms, tensors and states."""
        return ()

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return role -> (O, I) of the linear modules of this block."""
        return {role: shape for part in self.parts for role, shape in part.shapes().items()}

    def norms(self) -> dict[str, Norm]:
        """Return place -> norm of the norms that this block has if the family names them."""
        return {place: norm for part in self.parts for place, norm in part.norms().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return name -> tensor of the other tensors, except those of experts."""
        return {name: tensor for part in self.parts for name, tensor in part.tensors().items()}

    def links(self) -> tuple[Link, ...]:
        """Return the links inside this block, and those from the norms of the stream before it."""
        norms = {one.role: one.norm for one in self.LINEARS if one.stream == "reads" and one.norm is not None}
        read = tuple(Link(norms[role], (role,)) for role in self.shapes() if role in norms) if self.LINEARS else ()
        return (*read, *(link for part in self.parts for link in part.links()))

    @cached_property
    def names(self) -> frozenset[str]:
        """The roles, places of norms, and names of tensors of this block."""
        return frozenset({*self.shapes(), *self.norms(), *self.tensors()}.union(*(part.names for part in self.parts)))

    @property
    def shared_kind(self) -> str | None:
        """The kind of the state that this block reads from an earlier layer, None if it reads none."""
        return None

    @property
    def rotated_size(self) -> int | None:
        """Features of a head that may have positions; None for a block without positions."""
        return next((part.rotated_size for part in self.parts if part.rotated_size is not None), None)

    @property
    def mixed_size(self) -> int:
        """Number of features that the block mixes across tokens; 0 for none."""
        return max((part.mixed_size for part in self.parts), default=0)

    def states(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        """Return the shapes of the block's cache for B texts of up to S tokens: kind -> `ShapeDtypeStruct` (B, ...)."""
        return {kind: form for part in self.parts for kind, form in part.states(batch, length, dtype).items()}

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run the block on the normed stream x (B, T, H).

        Returns:
            (B, T, H), the output to add to the stream, and the cache with the block's new state.
        """
        raise NotImplementedError


def _linears(group: str) -> tuple[Linear, ...]:
    return (
        Linear(f"{group}gate_proj", "mlp.gate_proj", f"{group}mlp_in", "mlp", "ffn_gate"),
        Linear(f"{group}up_proj", "mlp.up_proj", f"{group}mlp_in", "mlp", "ffn_up"),
        Linear(f"{group}down_proj", "mlp.down_proj", f"{group}down_in", "mlp_post", "ffn_down", stream="writes"),
    )


@dataclass(frozen=True)
class Mlp(Block):
    """An MLP that all tokens go through.

    Attributes:
        gated: whether the activation is applied to a gate.
        group: prefix of its roles: "wide_" if its width differs from that of other layers, so that its weights are
            stacked separately; "shared_" for shared experts; or nothing.
    """

    hidden: int
    width: int
    gated: bool = True
    group: Literal["", "wide_", "shared_"] = ""

    LINEARS: ClassVar = (*_linears(""), *_linears("wide_"))

    def shapes(self) -> dict[str, tuple[int, int]]:
        inside, group = (self.width, self.hidden), self.group
        gate = {f"{group}gate_proj": inside} if self.gated else {}
        return gate | {f"{group}up_proj": inside, f"{group}down_proj": (self.hidden, self.width)}

    def links(self) -> tuple[Link, ...]:
        """Add the link from up to down; without a gate there is an activation in between, and no link."""
        inner = (Link(f"{self.group}up_proj", (f"{self.group}down_proj",)),) if self.gated else ()
        return (*super().links(), *inner)

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        gate = run.module(f"{self.group}gate_proj", x) if self.gated else None
        up = run.module(f"{self.group}up_proj", x)
        inner = run.activate(up) if gate is None else run.activate(gate) * up
        return run.module(f"{self.group}down_proj", inner), cache


@dataclass(frozen=True)
class Parallel(Block):
    """Two mixers side by side.

    Attributes:
        first: the block whose output comes first in the sum.
        second: the other one; the two share no role and no state.
    """

    first: Block
    second: Block

    @property
    def parts(self) -> tuple[Block, ...]:
        return self.first, self.second

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        first, cache = self.first.forward(run, x, cache)
        second, cache = self.second.forward(run, x, cache)
        return first + second, cache


@dataclass(frozen=True)
class PerLayerInput(Block):
    """A step after the MLP that multiplies the stream with a per-layer input, as in Gemma 4.

    The input is the sum of a row of a separate token embedding and a projection of the stream before the first layer.
    """

    hidden: int
    features: int

    LINEARS: ClassVar = (
        Linear("per_layer_input_gate", "per_layer_input_gate", "per_layer_in", None, "inp_gate"),
        Linear(
            "per_layer_projection", "per_layer_projection", "per_layer_out_in", "per_layer_out", "proj", stream="writes"
        ),
    )
    GGUF_NORMS: ClassVar = {"per_layer_out": "post_norm"}

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {
            "per_layer_input_gate": (self.features, self.hidden),
            "per_layer_projection": (self.hidden, self.features),
        }

    def norms(self) -> dict[str, Norm]:
        """Return the norm after it."""
        return {"per_layer_out": Norm("per_layer_out", self.hidden)}

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run the step on the stream itself; see `Block.forward`."""
        assert run.context.inputs is not None
        gate = run.activate(run.module("per_layer_input_gate", x))
        inner = gate * lax.dynamic_index_in_dim(run.context.inputs, run.layer.layer, keepdims=False)
        return run.norm("per_layer_out", run.module("per_layer_projection", inner)), cache


@flax.struct.dataclass
class LayerInputWeights:
    """The weights of per-layer inputs: (V, L * P) and (L * P, H) for L layers and P features of an input.

    Attributes:
        norm: float32 (P,), gain of the norm after the projection.
    """

    embedding: jax.Array
    projection: jax.Array
    norm: jax.Array


def layer_inputs(weights: LayerInputWeights | None, tokens: jax.Array, x: jax.Array, eps: float) -> jax.Array | None:
    """Return the per-layer inputs, (L, B, T, P) in the dtype of x; None in a model without any.

    They depend on the tokens, int32 (B, T), and on x (B, T, H), the stream before the first layer; `eps` is added to
    the mean square in the norm. Follows `Gemma4TextModel` of transformers.
    """
    if weights is None:
        return None
    features = len(weights.norm)
    shape = *x.shape[:2], -1, features
    projected = (linear(x, weights.projection) * x.shape[-1] ** -0.5).astype(x.dtype).reshape(shape)
    projected = rms_norm(projected, weights.norm, eps)
    own = rows_at(weights.embedding, tokens).astype(x.dtype) * jnp.asarray(features**0.5, x.dtype)
    return ((projected + own.reshape(shape)) * jnp.asarray(2**-0.5, x.dtype)).transpose(2, 0, 1, 3)
