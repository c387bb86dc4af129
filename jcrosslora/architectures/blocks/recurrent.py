"""Blocks that keep a state of fixed size: the last inputs of a convolution, and the matrices of a recurrence.

A linear recurrence keeps a matrix S instead of keys and values. Each token t updates and reads it:

    S_t = exp(g_t) S_(t-1) + k_t u_t',    y_t = S_t' q_t

In Mamba 2 (arXiv 2405.21060) u_t is the value v_t. In the gated delta rule (arXiv 2412.06464) it is
beta_t (v_t - exp(g_t) S_(t-1)' k_t): the value minus what the state already returns for the key. The tokens of a chunk
are computed together with matrix products, one chunk after the other. All numbers are float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

from jcrosslora.architectures.blocks.block import Block, Linear, Link, Tensor
from jcrosslora.architectures.ops import Row, einsum
from jcrosslora.architectures.run import KVCache, Run


@flax.struct.dataclass
class RecurrentState:
    """The state of a recurrent block after some tokens.

    Attributes:
        inputs: float32 (..., B, K - 1, C), the last inputs of the convolution.
        matrices: float32 (..., B, H, N, P), the states of the heads; H is 0 for a short convolution.
    """

    inputs: jax.Array
    matrices: jax.Array


@dataclass(frozen=True)
class Inside:
    """The modules and tensors of a recurrent block in one layer.

    Attributes:
        project: runs the module of a role on its input (B, T, I); returns (B, T, O) in the dtype of the input.
        tensors: its other tensors, float32, by the names of `Block.tensors`; "conv" is (C, K).
        eps: added to the mean square in the model's norms.
    """

    project: Callable[[str, jax.Array], jax.Array]
    tensors: Mapping[str, jax.Array]
    activate: Callable[[jax.Array], jax.Array]
    eps: float


@dataclass(frozen=True)
class RecurrentBlock(Block):
    """A block with a depthwise convolution over a few tokens, mostly followed by a linear recurrence.

    Attributes:
        taps: K, tokens that the convolution sees, the current one included.
        heads: H, heads of values, each with a state (N, P). A short convolution has no heads, groups, keys and values.
        groups: G, heads of queries and keys; consecutive H / G heads of values share one.
        key_size: N, features of a query or key.
        value_size: P, features of a value.
        conv_bias: whether the convolution has a bias.
    """

    hidden: int
    taps: int
    heads: int = 0
    groups: int = 0
    key_size: int = 0
    value_size: int = 0
    conv_bias: bool = False

    @property
    def inner(self) -> int:
        """Features of the values of all heads."""
        return self.heads * self.value_size

    @property
    def convolved(self) -> int:
        """C, features that the convolution takes."""
        return self.inner + 2 * self.groups * self.key_size

    @property
    def mixed_size(self) -> int:
        """Features that the convolution takes."""
        return self.convolved

    def of_convolution(self, path: str) -> dict[str, Tensor]:
        """Return the tensors of the convolution at a path in a layer."""
        bias = {"conv_bias": Tensor(f"{path}.bias", (self.convolved,))} if self.conv_bias else {}
        return {"conv": Tensor(f"{path}.weight", (self.convolved, 1, self.taps))} | bias

    @property
    def _kind(self) -> str:
        return type(self).__name__

    def states(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        del length, dtype
        return {self._kind: jax.eval_shape(lambda: self.first_state(batch))}

    def first_state(self, batch: int) -> RecurrentState:
        """Return the state of B texts before their first token."""
        return RecurrentState(
            jnp.zeros((batch, self.taps - 1, self.convolved), jnp.float32),
            jnp.zeros((batch, self.heads, self.key_size, self.value_size), jnp.float32),
        )

    def inside(self, run: Run) -> Inside:
        """Return the modules and tensors of the block in a layer."""
        own = {name: run.tensors[name] for name in self.tensors()}
        tensors = {name: x.array if isinstance(x, Row) else x for name, x in own.items()}
        return Inside(run.module, tensors | {"conv": tensors["conv"][:, 0]}, run.activate, run.settings.eps)

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        inside, valid, kind = self.inside(run), run.context.valid, self._kind
        if cache is None or kind not in cache.states:
            return self.mix(inside, x, self.first_state(len(x)), valid)[0], cache
        place, states = run.layer.places[kind], cache.states[kind]
        state = jax.tree.map(partial(lax.dynamic_index_in_dim, index=place, axis=0, keepdims=False), states)
        out, state = self.mix(inside, x, state, valid)
        changed = jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, place, 0), states, state)
        return out, cache.with_state(kind, changed)

    def mix(
        self, inside: Inside, x: jax.Array, state: RecurrentState, valid: jax.Array
    ) -> tuple[jax.Array, RecurrentState]:
        """Run the block on the next tokens of B texts, from the state after the earlier ones.

        The stream x (B, T, hidden) is normalised; `valid`, bool (B, T), is False at padding, which leaves the state.

        Returns:
            (B, T, hidden), and the state after these tokens.
        """
        raise NotImplementedError


def causal_convolution(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, state: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Apply a causal depthwise convolution to one sequence: y_t = sum_j weight_j x_(t - K + 1 + j) + bias.

    Args:
        x: float32 (T, C), features of the tokens; the weight is (C, K), and the bias (C,).
        state: float32 (K - 1, C), the last tokens before these; zeros at the start of a text.
        valid: bool (T,), False at padding, which stands before or after the tokens and is skipped.

    Returns:
        (T, C), undefined at padding; and the state for the next tokens.
    """
    length, taps = len(x), weight.shape[1]
    count = jnp.sum(valid, dtype=jnp.int32)
    first = jnp.where(count > 0, jnp.argmax(valid).astype(jnp.int32), 0)
    kept = jnp.where(valid[:, None], x, jnp.zeros((), x.dtype))
    rows = jnp.concatenate([jnp.zeros_like(state), kept])
    # In front of the first token, after any padding.
    rows = lax.dynamic_update_slice_in_dim(rows, state, first, 0)
    # A sum of shifted products: there are few taps, and the gradient needs no convolution.
    out = sum((rows[tap : tap + length] * weight[:, tap] for tap in range(taps)), start=jnp.zeros((), x.dtype))
    out = out if bias is None else out + bias
    return out, lax.dynamic_slice_in_dim(rows, first + count, taps - 1, 0)


@dataclass(frozen=True)
class ShortConvolution(RecurrentBlock):
    """A convolution between two gates. It has no heads, and its state is only the last inputs."""

    LINEARS: ClassVar = (
        Linear("conv_in_proj", "conv.in_proj", "conv_in", "attn", "shortconv.in_proj"),
        Linear("conv_out_proj", "conv.out_proj", "conv_out_in", "attn_post", "shortconv.out_proj", stream="writes"),
    )

    @property
    def convolved(self) -> int:
        """C, features that the convolution takes."""
        return self.hidden

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"conv_in_proj": (3 * self.hidden, self.hidden), "conv_out_proj": (self.hidden, self.hidden)}

    def tensors(self) -> dict[str, Tensor]:
        return self.of_convolution("conv.conv")

    def links(self) -> tuple[Link, ...]:
        """Add the link from the gate after the convolution."""
        return (*super().links(), Link("conv_in_proj", ("conv_out_proj",), self.hidden + np.arange(self.hidden)))

    def mix(
        self, inside: Inside, x: jax.Array, state: RecurrentState, valid: jax.Array
    ) -> tuple[jax.Array, RecurrentState]:
        """Run the block as `Lfm2ShortConv` of transformers; see `RecurrentBlock.mix`."""
        before, behind, inner = jnp.split(inside.project("conv_in_proj", x).astype(jnp.float32), 3, axis=-1)
        weight, bias = inside.tensors["conv"], inside.tensors.get("conv_bias")
        convolve = jax.vmap(causal_convolution, (0, None, None, 0, 0))
        mixed, inputs = convolve(before * inner, weight, bias, state.inputs, valid)
        return inside.project("conv_out_proj", (behind * mixed).astype(x.dtype)), RecurrentState(inputs, state.matrices)


CHUNK = 64


class Tokens(NamedTuple):
    """The inputs of a recurrence for T tokens, float32, for one head or for G heads of queries and H of values.

    Attributes:
        queries: (T, N) or (T, G, N), as are the keys.
        values: (T, P) or (T, H, P).
        decay: g, at most 0, (T,) or (T, H).
        beta: the delta rule's beta, shaped like `decay`; None for other recurrences.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    decay: jax.Array
    beta: jax.Array | None = None


def decaying_recurrence(tokens: Tokens, state: jax.Array, chunk: int = CHUNK) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence of one head from a state (N, P), `chunk` tokens (static) at a time.

    A token with a decay and a key (or a beta) of 0 leaves the state unchanged.

    Returns:
        (T, P), and the state after the last token.
    """
    length = len(tokens.queries)
    size = min(chunk, length)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, -length % size), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])

    state, out = lax.scan(_chunk, state, jax.tree.map(cut, tokens))
    return out.reshape(-1, tokens.values.shape[1])[:length], state


def _chunk(state: jax.Array, part: Tokens) -> tuple[jax.Array, jax.Array]:
    queries, keys, values, decay, beta = part
    total = jnp.cumsum(decay)
    between = total[:, None] - total[None, :]  # from token s (columns) to token t (rows)
    lower = jnp.tril(jnp.ones(between.shape, bool))
    # Masked before exp, which may overflow above the diagonal.
    weights = jnp.exp(jnp.where(lower, between, -jnp.inf))
    since = jnp.exp(total)[:, None]
    written = values if beta is None else _corrected(state, keys, values, weights, since, beta[:, None])
    scores = einsum("tn,sn->ts", queries, keys) * weights
    out = einsum("tn,np->tp", queries * since, state) + einsum("ts,sp->tp", scores, written)
    left = jnp.exp(total[-1] - total)[:, None]
    return since[-1] * state + einsum("tn,tp->np", keys * left, written), out


def _corrected(
    state: jax.Array, keys: jax.Array, values: jax.Array, weights: jax.Array, since: jax.Array, beta: jax.Array
) -> jax.Array:
    """Return u (T, P) of a chunk by the delta rule.

    u_t depends on all earlier u_s of the chunk: (I + tril(beta k k' weights, -1)) u = beta (v - decayed state' k).
    """
    answered = einsum("tn,np->tp", keys * since, state)
    # Solved rather than inverted by powers, whose entries grow until float32 loses all precision.
    system = beta * einsum("tn,sn->ts", keys, keys) * weights
    return solve_triangular(system, beta * (values - answered), lower=True, unit_diagonal=True)


def grouped_recurrence(tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence of H heads; each H / G consecutive heads share queries and keys.

    Returns:
        (T, H, P), and the state (H, N, P) after the last token.
    """
    queries, keys, *of_heads = tokens
    groups = queries.shape[1]

    def split(x: jax.Array, axis: int) -> jax.Array:
        return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])

    parts = Tokens._make((queries, keys, *(None if x is None else split(x, 1) for x in of_heads)))
    # Products of queries and keys are outside the inner vmap, so they are computed once per group.
    of_group = jax.vmap(decaying_recurrence, (Tokens._make((None, None, 1, 1, 1)), 0), (1, 0))
    of_all = jax.vmap(of_group, (1, 0), (1, 0))
    out, state_after = of_all(parts, split(state, 0))
    return out.reshape(tokens.values.shape), state_after.reshape(state.shape)
