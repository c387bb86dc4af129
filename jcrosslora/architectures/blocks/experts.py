"""Mixture of experts: routed experts, which the router chooses for each token, and shared experts."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jcrosslora.architectures.blocks.block import Block, Linear, Link, Mlp, Norm, Tensor
from jcrosslora.architectures.blocks.grouped import mix, run_experts, sort_by_expert, spread
from jcrosslora.architectures.ops import linear, rms_norm
from jcrosslora.architectures.run import MODULE_OUTPUT, KVCache, Run, Update

# How experts are scored: a softmax over all experts or over the chosen ones; a sigmoid before the choice or of the
# chosen ones; or "in turn": the best expert is weighed by a softmax over those that score nearly as high, then the
# second one by a softmax without the best.
Scores = Literal["softmax", "chosen", "sigmoid", "chosen sigmoid", "in turn"]


@dataclass(frozen=True)
class Routing:
    """How experts are chosen for a token, and weighed.

    Attributes:
        count: E, number of experts.
        used: number of experts per token.
        normalised: whether the weights of a token's experts sum to 1.
        sum_eps: added to their sum before they are divided by it; sigmoids may be zero.
        tolerance: of "in turn", half the largest relative distance from the best score; None for other scores.
        scaled_inputs: whether the weights multiply the inputs of experts instead of their outputs.
        groups: number of groups of experts.
        used_groups: number of groups that a token may use.
        group_best: a group's score is the sum of this many of its best experts' scores.
    """

    count: int
    used: int
    scores: Scores
    normalised: bool
    sum_eps: float
    tolerance: float | None
    scale: float
    scaled_inputs: bool
    groups: int
    used_groups: int
    group_best: int


@dataclass(frozen=True)
class Experts(Block):
    """E routed experts, a few for each token, and shared experts, which form one MLP.

    Attributes:
        hidden: H, features of the stream.
        width: I, the features inside one expert.
        held: names of their tensors, see `ExpertRules.layouts`.
        gated: whether routed and shared experts have a gate.
        clamp: alpha and limit of the activation, see `ExpertRules.clamp`; None for the model's activation.
        latent: features that experts read and return instead of H; None for H.
        shared: features inside the shared experts, 0 for none.
        shared_gate: whether a gate weighs the output of the shared experts.
        averaged: whether the outputs of routed and shared experts are averaged instead of added.
    """

    hidden: int
    width: int
    routing: Routing
    held: tuple[str, ...]
    gated: bool = True
    clamp: tuple[float, float] | None = None
    latent: int | None = None
    shared: int = 0
    shared_gate: bool = False
    averaged: bool = False

    LINEARS: ClassVar = (
        Linear("shared_gate_proj", "mlp.shared_experts.gate_proj", "shared_in", "mlp", "ffn_gate_shexp"),
        Linear("shared_up_proj", "mlp.shared_experts.up_proj", "shared_in", "mlp", "ffn_up_shexp"),
        Linear(
            *("shared_down_proj", "mlp.shared_experts.down_proj", "shared_down_in", "mlp_post", "ffn_down_shexp"),
            stream="writes",
        ),
        Linear("shared_expert_gate", "mlp.shared_expert_gate", "shared_in", "mlp", "ffn_gate_inp_shexp"),
        Linear("expert_in_proj", "mlp.fc1_latent_proj", "expert_in", "mlp", "ffn_latent_down"),
        Linear("expert_out_proj", "mlp.fc2_latent_proj", "expert_out_in", "mlp_post", "ffn_latent_up", stream="writes"),
    )
    # Tensor of a layer of a GGUF file -> its name in `ExpertRules.layouts`.
    GGUF_TENSORS: ClassVar = {
        "ffn_gate_inp.weight": "router",
        "ffn_gate_inp.bias": "router_bias",
        "exp_probs_b.bias": "correction",
        **{f"ffn_{part}_exps.weight": part for part in ("gate", "up", "gate_up", "down")},
        **{f"ffn_{part}_exps.bias": f"{part}_bias" for part in ("gate", "up", "down")},
    }

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return role -> (O, I); the matrices of routed experts have no role."""
        found = self._shared_mlp.shapes() if self.shared else {}
        if self.shared_gate:
            found["shared_expert_gate"] = (1, self.hidden)
        if self.latent is not None:
            found |= {"expert_in_proj": (self.latent, self.hidden), "expert_out_proj": (self.hidden, self.latent)}
        return found

    def links(self) -> tuple[Link, ...]:
        """Add links to the router and the experts, and from up to down unless up is clamped or has no gate."""
        latent = self.latent is not None
        found = [*super().links(), Link("mlp", ("router",))]
        found.append(Link("expert_in_proj" if latent else "mlp", ("gate_up",)))
        found += self._shared_mlp.links() if self.shared else ()
        if self.gated and self.clamp is None:
            found.append(Link("gate_up", ("down",), self.width + np.arange(self.width)))
        return tuple(found)

    @property
    def _shared_mlp(self) -> Mlp:
        return Mlp(self.hidden, self.shared, self.gated, "shared_")

    def matrix_shape(self, matrix: str) -> tuple[int, int, int]:
        """Return (E, O, I) of a matrix of all experts of a layer, "gate_up" or "down"."""
        outside = self.hidden if self.latent is None else self.latent
        if matrix == "down":
            return self.routing.count, outside, self.width
        return self.routing.count, (1 + self.gated) * self.width, outside

    @property
    def names(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The roles, and the tensors of experts."""
        return frozenset({*self.shapes(), *self.held})

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run the experts; the router reads the same input. See `Block.forward`."""
        return self.mixed(run, x, x), cache

    def mixed(self, run: Run, x: jax.Array, routed: jax.Array) -> jax.Array:
        """Run the experts on x (B, T, H), and add the shared experts; the router reads `routed` (B, T, H)."""
        tensors, flat = run.tensors, x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        read = routed.reshape(flat.shape)
        chosen, weights = route(
            self.routing, read, tensors["router"], tensors.get("router_bias"), tensors.get("correction")
        )
        weights = weights * tensors["expert_scale"][chosen] if "expert_scale" in tensors else weights
        if self.latent is not None:
            flat = run.module("expert_in_proj", x).reshape(len(flat), -1)

        order = sort_by_expert(chosen, self.routing.count)

        def product(name: str, rows: jax.Array) -> jax.Array:
            held = {key: tensors[key] for key in (name, f"{name}_bias") if key in tensors}
            factors = {key: run.layer.factors[key] for key in (name,) if key in run.layer.factors}
            return checkpoint_name(run_experts(partial(_matrix, name), rows, order, held, factors), MODULE_OUTPUT)

        scaled = self.routing.scaled_inputs
        rows = spread(flat, order, weights if scaled else None)
        inner = self._activated(run, product("gate_up", rows)).astype(rows.dtype)
        shares = jnp.ones_like(weights) if scaled else weights
        mixed = mix(product("down", inner), shares, order).astype(x.dtype).reshape(*x.shape[:-1], -1)
        mixed = mixed if self.latent is None else run.module("expert_out_proj", mixed)
        if not self.shared:
            return mixed
        shared, _ = self._shared_mlp.forward(run, x, None)
        if self.shared_gate:
            shared = shared * jax.nn.sigmoid(run.module("shared_expert_gate", x))
        both = mixed + shared
        return both * jnp.asarray(0.5, both.dtype) if self.averaged else both

    def _activated(self, run: Run, inner: jax.Array) -> jax.Array:
        """Apply the activation to gate and up, (N, 2 I) side by side, or without a gate to (N, I)."""
        if not self.gated:
            return run.activate(inner)
        gate, up = jnp.split(inner, 2, axis=-1)
        if self.clamp is None:
            return run.activate(gate) * up
        alpha, limit = self.clamp
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


@dataclass(frozen=True)
class MlpAndExperts(Block):
    """An MLP and experts, whose outputs are added.

    Attributes:
        apart: whether MLP and experts have separate norms, as in Gemma 4; experts and router then read the stream
            through norms of their own.
    """

    mlp: Mlp
    experts: Experts
    apart: bool = False

    GGUF_NORMS: ClassVar = {
        "mlp_alone": "post_ffw_norm_1",
        "experts_in": "pre_ffw_norm_2",
        "experts_out": "post_ffw_norm_2",
    }

    @property
    def parts(self) -> tuple[Block, ...]:
        return self.mlp, self.experts

    def norms(self) -> dict[str, Norm]:
        """Return the norms after the MLP and around the experts."""
        return {name: Norm(name, self.mlp.hidden) for name in self.GGUF_NORMS} if self.apart else {}

    def links(self) -> tuple[Link, ...]:
        """Return the links of both; with `apart`, experts and router read norms of their own."""
        read = {"router": "router_scale", "gate_up": "experts_in"} if self.apart else {}
        return tuple(link._replace(writer=read.get(link.readers[0], link.writer)) for link in super().links())

    def tensors(self) -> dict[str, Tensor]:
        """Return the gain of the router's input, and a factor for each expert."""
        if not self.apart:
            return {}
        return {
            "router_scale": Tensor("router.scale", (self.mlp.hidden,)),
            "expert_scale": Tensor("router.per_expert_scale", (self.experts.routing.count,)),
        }

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        alone, _ = self.mlp.forward(run, x, None)
        if not self.apart:
            return self.experts.mixed(run, x, x) + alone, cache
        alone, stream = run.norm("mlp_alone", alone), run.stream
        routed = rms_norm(stream, run.tensors["router_scale"] * self.mlp.hidden**-0.5, run.settings.eps)
        mixed = self.experts.mixed(run, run.norm("experts_in", stream), routed)
        return alone + run.norm("experts_out", mixed), cache


def _matrix(name: str, rows: jax.Array, held: dict[str, Any], factors: dict[str, Update]) -> jax.Array:
    """Multiply rows (N, I) with a matrix of one expert, with its bias and adapter: float32 (N, O)."""
    out = linear(rows, held[name])
    if f"{name}_bias" in held:
        out = out + held[f"{name}_bias"]
    return factors[name].apply(rows, out) if name in factors else out


def route(
    settings: Routing, x: jax.Array, router: jax.Array, bias: jax.Array | None, correction: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of tokens x (T, H) by a router, float32 (E, H), whose bias is float32 (E,).

    The correction, float32 (E,), is added to the scores for the choice only, not to the weights.

    Returns:
        int32 (T, K), the experts of each token, and float32 (T, K), their weights.
    """
    logits = linear(x.astype(jnp.float32), router)
    logits = logits if bias is None else logits + bias
    if settings.scores in ("chosen", "chosen sigmoid"):
        best, experts = lax.top_k(logits, settings.used)
        soft = settings.scores == "chosen"
        return experts, jax.nn.softmax(best, axis=-1) if soft else _weights(settings, jax.nn.sigmoid(best))
    if settings.tolerance is not None:
        return _in_turn(logits, settings.tolerance)
    scores = jax.nn.sigmoid(logits) if settings.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = scores if correction is None else scores + correction
    experts = lax.top_k(_in_groups(settings, lax.stop_gradient(choice)), settings.used)[1]
    return experts, _weights(settings, jnp.take_along_axis(scores, experts, axis=-1))


def _weights(settings: Routing, scores: jax.Array) -> jax.Array:
    """Return the weights of experts by their scores (T, K)."""
    if settings.normalised:
        scores = scores / (jnp.sum(scores, axis=-1, keepdims=True) + settings.sum_eps)
    return scores * settings.scale


def _in_turn(logits: jax.Array, tolerance: float) -> tuple[jax.Array, jax.Array]:
    """Choose the best and the second expert; the weight of each is a softmax over experts with nearly equal scores.

    Follows `sparsemixer` of transformers (arXiv 2409.12136) as it is outside of training.
    """
    experts, weights, left = [], [], logits
    for _ in range(2):
        best = jnp.max(left, axis=-1, keepdims=True)
        distance = (best - logits) / jnp.maximum(jnp.abs(logits), best)
        near = jax.nn.softmax(jnp.where(lax.stop_gradient(distance) > 2 * tolerance, -jnp.inf, left), axis=-1)
        expert = jnp.argmax(left, axis=-1, keepdims=True).astype(jnp.int32)
        weights.append(jnp.take_along_axis(near, expert, axis=-1))
        experts.append(expert)
        left = jnp.where(jnp.arange(logits.shape[-1]) == expert, -jnp.inf, left)
    return jnp.concatenate(experts, axis=-1), jnp.concatenate(weights, axis=-1)


def _in_groups(settings: Routing, choice: jax.Array) -> jax.Array:
    """Return the scores (T, E), -inf outside the groups whose best experts have the largest sums of scores."""
    if settings.groups == 1:
        return choice
    grouped = choice.reshape(len(choice), settings.groups, -1)
    best = jnp.sum(lax.top_k(grouped, min(settings.group_best, grouped.shape[-1]))[0], axis=-1)
    kept = lax.top_k(best, settings.used_groups)[1]
    inside = jnp.any(kept[:, :, None] == jnp.arange(settings.groups), axis=1)
    return jnp.where(inside[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
