"""Linear attention by the gated delta rule, as in Qwen3-Next, Qwen3.5 and OLMo Hybrid (arXiv 2412.06464)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.architectures.blocks.block import Linear, Tensor
from jcrosslora.architectures.blocks.recurrent import (
    Inside,
    RecurrentBlock,
    RecurrentState,
    Tokens,
    causal_convolution,
    grouped_recurrence,
)
from jcrosslora.architectures.ops import rms_norm

_LENGTH_EPS = 1e-6  # added to the square of the length of queries and keys
_HOLDER = "linear_attn"


def _reader(role: str, gguf: str | None = None) -> Linear:
    return Linear(role, f"{_HOLDER}.{role.removeprefix('delta_')}", "delta_in", "attn", gguf)


@dataclass(frozen=True)
class DeltaRule(RecurrentBlock):
    """The gated delta rule, with a norm of each head and a gate after it; see `RecurrentBlock` for its sizes.

    Attributes:
        form: of the modules in front: four, of which one returns queries, keys and values; six, with one for each of
            these ("separate"); or two with rows sorted by group, queries, keys, values and gates of each in one, the
            two numbers of each head of values in the other ("grouped").
        beta_limit: what the rate at which it writes lies below; above 1 the state may change its sign.
        eps: added to the mean square in its norm; None for that of the model.
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
        """Return role -> (O, I)."""
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
        """Split queries and keys (T, G, N), of fixed lengths, and values (T, H, P) out of (T, C)."""
        width = self.groups * self.key_size
        queries, keys, values = jnp.split(mixed, (width, 2 * width), axis=-1)
        queries, keys = (_unit(part.reshape(len(part), self.groups, self.key_size)) for part in (queries, keys))
        return queries * self.key_size**-0.5, keys, values.reshape(len(values), self.heads, self.value_size)


def _unit(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _LENGTH_EPS)
