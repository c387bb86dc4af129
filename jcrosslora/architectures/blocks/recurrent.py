"""Blocks that keep a state of fixed size: the last inputs of a convolution, and the matrices of a recurrence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.architectures.blocks.block import Block, Tensor
from jcrosslora.architectures.cache import KVCache
from jcrosslora.architectures.ops import Row
from jcrosslora.architectures.run import Run


@flax.struct.dataclass
class RecurrentState:
    """What a recurrent block keeps of the tokens before.

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
        project: of a role and its input (B, T, I): the output (B, T, O) of the module, in the dtype of the input.
        tensors: its other tensors, float32, by the names of `Block.tensors`; "conv" is (C, K).
        activate: the activation of the model.
        eps: added to the mean square in the norms of the model.
    """

    project: Callable[[str, jax.Array], jax.Array]
    tensors: Mapping[str, jax.Array]
    activate: Callable[[jax.Array], jax.Array]
    eps: float


@dataclass(frozen=True)
class RecurrentBlock(Block):
    """A block with a convolution of each feature over a few tokens, and in most a linear recurrence behind it.

    Attributes:
        hidden: features of the stream.
        taps: K, tokens that the convolution sees, its own included.
        heads: H, heads of values, each with a state (N, P); 0 for a short convolution, as the next three.
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
        """Return the tensors of the convolution, whose module is at a path in a layer."""
        bias = {"conv_bias": Tensor(f"{path}.bias", (self.convolved,))} if self.conv_bias else {}
        return {"conv": Tensor(f"{path}.weight", (self.convolved, 1, self.taps))} | bias

    @property
    def _kind(self) -> str:
        return type(self).__name__

    def states(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        """Return the form of the state."""
        del length, dtype
        return {self._kind: jax.eval_shape(lambda: self.first_state(batch))}

    def first_state(self, batch: int) -> RecurrentState:
        """Return the state of B texts before their first token."""
        return RecurrentState(
            jnp.zeros((batch, self.taps - 1, self.convolved), jnp.float32),
            jnp.zeros((batch, self.heads, self.key_size, self.value_size), jnp.float32),
        )

    def inside(self, run: Run) -> Inside:
        """Return what the block has in a layer."""
        own = {name: run.tensors[name] for name in self.tensors()}
        tensors = {name: x.array if isinstance(x, Row) else x for name, x in own.items()}
        return Inside(run.module, tensors | {"conv": tensors["conv"][:, 0]}, run.activate, run.settings.eps)

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run the block; see `Block.forward`."""
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
        """Run the block on the next tokens of B texts.

        Args:
            inside: its modules and tensors.
            x: (B, T, hidden), normalised.
            state: after the tokens before.
            valid: bool (B, T), False at padding, which leaves the state as it is.

        Returns:
            (B, T, hidden), and the state after these tokens.
        """
        raise NotImplementedError


def causal_convolution(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, state: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Convolve the tokens of one sequence with those before them, y_t = sum_j weight_j x_(t - K + 1 + j) + bias.

    Args:
        x: float32 (T, C), features of the tokens.
        weight: float32 (C, K).
        bias: float32 (C,), or None.
        state: float32 (K - 1, C), the last tokens before these; zeros at the start of a text.
        valid: bool (T,), False at padding, which stands before or behind the tokens and is skipped.

    Returns:
        (T, C), undefined at padding; and the state for the tokens that follow.
    """
    length, taps = len(x), weight.shape[1]
    count = jnp.sum(valid, dtype=jnp.int32)
    first = jnp.where(count > 0, jnp.argmax(valid).astype(jnp.int32), 0)
    kept = jnp.where(valid[:, None], x, jnp.zeros((), x.dtype))
    rows = jnp.concatenate([jnp.zeros_like(state), kept])
    # In front of the first token, behind any padding.
    rows = lax.dynamic_update_slice_in_dim(rows, state, first, 0)
    # As products of shifted arrays: few taps, and a gradient without the convolution's own rules.
    out = sum((rows[tap : tap + length] * weight[:, tap] for tap in range(taps)), start=jnp.zeros((), x.dtype))
    out = out if bias is None else out + bias
    return out, lax.dynamic_slice_in_dim(rows, first + count, taps - 1, 0)
