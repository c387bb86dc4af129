"""The positions of a batch's tokens in their texts, with padding and with several texts in a row."""

from typing import NamedTuple, Self

import chex
import jax
import jax.numpy as jnp

from jcrosslora.architectures.run import EMPTY


class Layout(NamedTuple):
    """Places of the tokens (B, T) of a batch.

    Texts of one row may branch: several go on from the same tokens. A token sees those before it in its row that have
    not ended.

    Attributes:
        positions: int32 (B, T), how many tokens of its text are before each; -1 at padding.
        lengths: int32 (B, T), or (B, 1) if a row is one text: tokens of the longest text that a token belongs to.
        ends: int32 (B, T), the slot of the row from which on no token sees this one; None if a row is one text.
    """

    positions: jax.Array
    lengths: jax.Array
    ends: jax.Array | None = None

    @classmethod
    def of(cls, mask: jax.Array) -> Self:
        """Return the layout of rows of one text, by a mask (B, T) that is False at padding on either side."""
        return cls(positions_of(mask, mask)[1], jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32))

    def behind(self, before: jax.Array) -> Self:
        """Return the layout of rows that go on after `before`, int32 (B,), tokens."""
        positions = jnp.where(self.positions < 0, EMPTY, self.positions + before[:, None])
        return self._replace(positions=positions, lengths=self.lengths + before[:, None])

    @property
    def queries_and_keys(self) -> tuple[jax.Array, jax.Array]:
        """The positions as from `positions_of`."""
        return jnp.maximum(self.positions, 0), self.positions

    def seen(self, before: int) -> jax.Array | None:
        """Return which of S keys each token may see, bool (B, T, S), of which all rows have `before` in front."""
        if self.ends is None:
            return None
        slots = jnp.arange(self.ends.shape[1])
        own = (slots[:, None] >= slots) & (slots[:, None] < self.ends[:, None])
        return jnp.pad(own, ((0, 0), (0, 0), (before, 0)), constant_values=True)


def positions_of(tokens: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return int32 (B, T) positions of queries (at padding those of a neighbour) and of keys (-1 at padding)."""
    valid = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    chex.assert_equal_shape([tokens, valid])
    counted = jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1
    return jnp.maximum(counted, 0), jnp.where(valid, counted, EMPTY)
