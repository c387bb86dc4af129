"""Linear recurrences: Mamba 2 (arXiv 2405.21060), and the gated delta rule (arXiv 2412.06464).

The delta rule is the linear attention of Qwen3-Next, Qwen3.5 and OLMo Hybrid.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.architectures.blocks.block import Linear, Link, Tensor
from jcrosslora.architectures.blocks.recurrent import (
    Inside,
    RecurrentBlock,
    RecurrentState,
    Tokens,
    causal_convolution,
    grouped_recurrence,
)
from jcrosslora.architectures.ops import ACTIVATIONS, rms_norm
from jcrosslora.architectures.run import Run

_LENGTH_EPS = 1e-6  # added to the square of the length of queries and keys
_HOLDER = "linear_attn"


def _reader(role: str, gguf: str | None = None) -> Linear:
    return Linear(role, f"{_HOLDER}.{role.removeprefix('delta_')}", "delta_in", "attn", gguf)


@dataclass(frozen=True)
class DeltaRule(RecurrentBlock):
    """The gated delta rule, with a norm of each head and a gate after it; see `RecurrentBlock` for its sizes.

    Attributes:
        form: layout of the input modules: "joined", four modules, one of them for queries, keys and values; "separate",
            six, one for each of these; "grouped", two with rows sorted by group, one for queries, keys, values and
            gates, the other for the two numbers of each value head.
        beta_limit: upper bound of beta; above 1 the state may change its sign.
        eps: added to the mean square in its norm; None for the model's epsilon.
    """

    form: Literal["joined", "separate", "grouped"] = "joined"
    beta_limit: float = 1.0
    eps: float | None = None

    LINEARS: ClassVar = (
        _reader("in_proj_qkvz"),
        _reader("in_proj_ba", "ssm_ba"),
        *map(_reader, ("delta_q_proj", "delta_k_proj", "delta_v_proj")),
        _reader("in_proj_qkv", "attn_qkv"),
        _reader("in_proj_z", "attn_gate"),
        _reader("in_proj_b", "ssm_beta"),
        _reader("in_proj_a", "ssm_alpha"),
        Linear("delta_out_proj", f"{_HOLDER}.out_proj", "delta_out_in", "attn_post", "ssm_out", stream="writes"),
    )

    def shapes(self) -> dict[str, tuple[int, int]]:
        hidden, keys = self.hidden, (self.groups * self.key_size, self.hidden)
        out = {"delta_out_proj": (hidden, self.inner)}
        if self.form == "grouped":
            return {"in_proj_qkvz": (self.convolved + self.inner, hidden), "in_proj_ba": (2 * self.heads, hidden)} | out
        first = {"in_proj_qkv": (self.convolved, hidden)}
        if self.form == "separate":
            first = {"delta_q_proj": keys, "delta_k_proj": keys, "delta_v_proj": (self.inner, hidden)}
        numbers = (self.heads, hidden)
        return first | {"in_proj_z": (self.inner, hidden), "in_proj_b": numbers, "in_proj_a": numbers} | out

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the convolution, of the decay and of the norm."""
        norm = "o_norm" if self.form == "separate" else "norm"
        numbers = {name: Tensor(f"{_HOLDER}.{name}", (self.heads,)) for name in ("A_log", "dt_bias")}
        norms = {"norm": Tensor(f"{_HOLDER}.{norm}.weight", (self.value_size,))}
        return self.of_convolution(f"{_HOLDER}.conv1d") | numbers | norms

    def links(self) -> tuple[Link, ...]:
        """Add the link from the norm, which all heads share."""
        return (*super().links(), Link("norm", ("delta_out_proj",), np.arange(self.inner) % self.value_size))

    def mix(
        self, inside: Inside, x: jax.Array, state: RecurrentState, valid: jax.Array
    ) -> tuple[jax.Array, RecurrentState]:
        """Run the block as the classes named `*GatedDeltaNet` of transformers; see `RecurrentBlock.mix`."""
        mixed, gate, rate, step = (part.astype(jnp.float32) for part in self._projected(inside, x))

        def of_text(
            mixed: jax.Array, rate: jax.Array, step: jax.Array, state: RecurrentState, valid: jax.Array
        ) -> tuple[jax.Array, RecurrentState]:
            mixed, inputs = causal_convolution(mixed, inside.tensors["conv"], None, state.inputs, valid)
            queries, keys, values = self._split(inside.activate(mixed))
            # Padding neither decays the state nor writes to it.
            kept = valid[:, None]
            beta = jnp.where(kept, self.beta_limit * jax.nn.sigmoid(rate), 0.0)
            decay = -jnp.exp(inside.tensors["A_log"]) * jax.nn.softplus(step + inside.tensors["dt_bias"])
            tokens = Tokens(queries, keys, values, jnp.where(kept, decay, 0.0), beta)
            out, matrices = grouped_recurrence(tokens, state.matrices)
            return out, RecurrentState(inputs, matrices)

        out, state = jax.vmap(of_text)(mixed, rate, step, state, valid)
        out = rms_norm(out, inside.tensors["norm"], inside.eps if self.eps is None else self.eps) * jax.nn.silu(
            gate.reshape(out.shape)
        )
        return inside.project("delta_out_proj", out.reshape(gate.shape).astype(x.dtype)), state

    def _projected(self, inside: Inside, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return queries, keys and values side by side (B, T, C), gates (B, T, H P), and two numbers a head."""
        if self.form != "grouped":
            gate, rate, step = (inside.project(role, x) for role in ("in_proj_z", "in_proj_b", "in_proj_a"))
            roles = ("delta_q_proj", "delta_k_proj", "delta_v_proj") if self.form == "separate" else ("in_proj_qkv",)
            return jnp.concatenate([inside.project(role, x) for role in roles], axis=-1), gate, rate, step
        both, numbers = (
            inside.project(role, x).reshape(*x.shape[:-1], self.groups, -1) for role in ("in_proj_qkvz", "in_proj_ba")
        )
        width, each = self.key_size, self.inner // self.groups
        parts = (*jnp.split(both, (width, 2 * width, 2 * width + each), axis=-1), *jnp.split(numbers, 2, axis=-1))
        queries, keys, values, gate, rate, step = (part.reshape(*x.shape[:-1], -1) for part in parts)
        return jnp.concatenate([queries, keys, values], axis=-1), gate, rate, step

    def _split(self, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Split (T, C) into queries and keys (T, G, N), both normalised, and values (T, H, P)."""
        width = self.groups * self.key_size
        queries, keys, values = jnp.split(mixed, (width, 2 * width), axis=-1)
        queries, keys = (_unit(part.reshape(len(part), self.groups, self.key_size)) for part in (queries, keys))
        return queries * self.key_size**-0.5, keys, values.reshape(len(values), self.heads, self.value_size)


def _unit(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _LENGTH_EPS)


@dataclass(frozen=True)
class Mamba2(RecurrentBlock):
    """A state-space model; see `RecurrentBlock` for its sizes.

    Attributes:
        norm: where the output's norm is, applied to each of `groups`; None if there is only a gate.
        step_limits: bounds of the time step.
        holder: name of the module in a layer that contains it.
        activation: activation after the convolution; None for the model's.
        factors: factors on gate, values, keys, queries and time steps; empty if there are none.
        open_output: whether its output projection can have an update. In some classes PEFT refuses it; there it is a
            plain tensor.
        output_bias: whether the output projection has a bias, if it is a plain tensor.
    """

    norm: Literal["before the gate", "behind the gate"] | None = None
    step_limits: tuple[float, float] = (0.0, float("inf"))
    holder: str = "mamba"
    activation: str | None = None
    factors: tuple[float, ...] = ()
    open_output: bool = True
    output_bias: bool = False

    LINEARS: ClassVar = (
        Linear("mamba_in_proj", "mamba.in_proj", "mamba_in", "attn", "ssm_in"),
        Linear("mamba_out_proj", "mamba.out_proj", "mamba_out_in", "attn_post", "ssm_out", stream="writes"),
    )

    def shapes(self) -> dict[str, tuple[int, int]]:
        found = {"mamba_in_proj": (self.inner + self.convolved + self.heads, self.hidden)}
        return found | ({"mamba_out_proj": (self.hidden, self.inner)} if self.open_output else {})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the convolution, the decay, the norm, and the output projection if it is a tensor."""
        holder = self.holder
        found = self.of_convolution(f"{holder}.conv1d")
        found |= {name: Tensor(f"{holder}.{name}", (self.heads,)) for name in ("A_log", "dt_bias", "D")}
        if not self.open_output:
            weight = Tensor(f"{holder}.out_proj.weight", (self.hidden, self.inner), exact=False)
            found["mamba_out_proj"] = weight
            if self.output_bias:
                found["mamba_out_bias"] = Tensor(f"{holder}.out_proj.bias", (self.hidden,))
        if self.norm is not None:
            found["norm"] = Tensor(f"{holder}.norm.weight", (self.inner,))
        return found

    def links(self) -> tuple[Link, ...]:
        """Add the link from the norm, if there is one and the output projection can have an update."""
        inner = (Link("norm", ("mamba_out_proj",)),) if self.norm is not None and self.open_output else ()
        return (*super().links(), *inner)

    def inside(self, run: Run) -> Inside:
        """Return the modules and tensors of the block in a layer; the output projection may be a plain tensor."""
        own = super().inside(run)
        if self.activation is not None:
            own = dataclasses.replace(own, activate=ACTIVATIONS[self.activation])
        if self.open_output:
            return own
        layer = run.layer
        biases = {"mamba_out_proj": own.tensors["mamba_out_bias"]} if self.output_bias else {}
        weights = {**layer.weights, "mamba_out_proj": run.tensors["mamba_out_proj"]}
        layer = dataclasses.replace(layer, weights=weights, biases={**layer.biases, **biases})
        return dataclasses.replace(own, project=dataclasses.replace(run, layer=layer).module)

    def mix(
        self, inside: Inside, x: jax.Array, state: RecurrentState, valid: jax.Array
    ) -> tuple[jax.Array, RecurrentState]:
        """Run the block as `GraniteMoeHybridMambaLayer` and `FalconH1Mixer` of transformers do."""
        projected = self._scaled(inside.project("mamba_in_proj", x).astype(jnp.float32))
        gate, mixed, step = jnp.split(projected, (self.inner, self.inner + self.convolved), axis=-1)

        def of_text(
            mixed: jax.Array, step: jax.Array, state: RecurrentState, valid: jax.Array
        ) -> tuple[jax.Array, RecurrentState]:
            tensors, groups = inside.tensors, (len(mixed), self.groups, self.key_size)
            mixed, inputs = causal_convolution(mixed, tensors["conv"], tensors.get("conv_bias"), state.inputs, valid)
            widths = (self.inner, self.inner + self.groups * self.key_size)
            values, keys, queries = jnp.split(inside.activate(mixed), widths, axis=-1)
            values = values.reshape(len(mixed), self.heads, self.value_size)
            step = jnp.clip(jax.nn.softplus(step + tensors["dt_bias"]), *self.step_limits)
            # Padding neither decays the state nor writes to it.
            step = jnp.where(valid[:, None], step, 0.0)
            decay = -jnp.exp(tensors["A_log"]) * step
            tokens = Tokens(queries.reshape(groups), keys.reshape(groups), values * step[..., None], decay)
            out, matrices = grouped_recurrence(tokens, state.matrices)
            out = out + values * tensors["D"][:, None]
            return out.reshape(len(out), self.inner), RecurrentState(inputs, matrices)

        out, state = jax.vmap(of_text)(mixed, step, state, valid)
        return inside.project("mamba_out_proj", self._gated(inside, out, jax.nn.silu(gate)).astype(x.dtype)), state

    def _scaled(self, projected: jax.Array) -> jax.Array:
        """Apply Falcon's factors on gate, values, keys, queries and time steps."""
        if not self.factors:
            return projected
        group = self.groups * self.key_size
        widths = (self.inner, self.inner, group, group, self.heads)
        factors = jnp.repeat(
            jnp.asarray(self.factors, jnp.float32), jnp.asarray(widths), total_repeat_length=projected.shape[-1]
        )
        return projected * factors

    def _gated(self, inside: Inside, out: jax.Array, gate: jax.Array) -> jax.Array:
        match self.norm:
            case None:
                return out * gate
            case "before the gate":
                return self._group_norm(inside, out) * gate
            case "behind the gate":
                return self._group_norm(inside, out * gate)

    def _group_norm(self, inside: Inside, x: jax.Array) -> jax.Array:
        groups = x.reshape(*x.shape[:-1], self.groups, -1)
        gain = inside.tensors["norm"].reshape(self.groups, -1)
        return rms_norm(groups, gain, inside.eps).reshape(x.shape)
