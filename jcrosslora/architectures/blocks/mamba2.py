"""State-space layers as in Mamba 2 (arXiv 2405.21060)."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jcrosslora.architectures.blocks.block import Linear, Tensor
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


@dataclass(frozen=True)
class Mamba2(RecurrentBlock):
    """A state-space model; see `RecurrentBlock` for its sizes.

    Attributes:
        norm: place of the output's norm, for each of `groups`; None if there is only a gate.
        step_limits: bounds of the time step.
        holder: module of a layer that holds it.
        activation: after the convolution; None for that of the model.
        factors: on gate, values, keys, queries and time steps; empty if there are none.
        open_output: whether its last module can have an update. PEFT refuses that of some classes, for which it is a
            tensor among others.
        output_bias: whether that module has a bias, where it cannot.
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
        """Return role -> (O, I)."""
        found = {"mamba_in_proj": (self.inner + self.convolved + self.heads, self.hidden)}
        return found | ({"mamba_out_proj": (self.hidden, self.inner)} if self.open_output else {})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the convolution, of the decay, of the norm, and the last module if it is one."""
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

    def inside(self, run: Run) -> Inside:
        """Return the modules and tensors of the block in a layer; its last module may be a tensor."""
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


def gguf_tensors(holder: str) -> dict[str, str]:
    """Return the names of the tensors of Mamba 2 in GGUF -> those in a layer, given the module that holds it."""
    names = {"ssm_a": "A_log", "ssm_d": "D", "ssm_dt.bias": "dt_bias", "ssm_norm.weight": "norm.weight"}
    names |= {f"ssm_conv1d.{kind}": f"conv1d.{kind}" for kind in ("weight", "bias")}
    return {stored: f"{holder}.{name}" for stored, name in names.items()}
