"""The positions of a batch's tokens in their texts, with padding and with several texts in a row."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from jcrosslora.architectures.run import EMPTY


class Layout(NamedTuple):
    """Positions of the tokens (B, T) of a batch.

    Texts of one row may branch: several continue the same tokens. A token sees those before it in its row that have
    not ended.

    Attributes:
        positions: int32 (B, T), position of each token in its text; -1 at padding.
        lengths: int32 (B, T), or (B, 1) if a row is one text: tokens of the longest text that a token belongs to; None
            if the positions of a row reach the end of its text.
        ends: int32 (B, T), the slot of the row from which on no token sees this one; None if a row is one text.
    """

    positions: jax.Array
    lengths: jax.Array | None = None
    ends: jax.Array | None = None

    @classmethod
    def of(cls, mask: jax.Array) -> Self:
        """Return the layout of rows with one text each, from a mask (B, T) that is False at padding on either side."""
        counted = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
        return cls(jnp.where(mask, counted - 1, EMPTY), counted[:, -1:])

    def behind(self, before: jax.Array) -> Self:
        """Return the layout shifted by the number of tokens before each row, int32 (B,)."""
        positions = jnp.where(self.positions < 0, EMPTY, self.positions + before[:, None])
        lengths = None if self.lengths is None else self.lengths + before[:, None]
        return self._replace(positions=positions, lengths=lengths)

    def seen(self, before: int) -> jax.Array | None:
        """Return which of S keys each token may see, bool (B, T, S); the first `before` keys are a common prefix."""
        if self.ends is None:
            return None
        slots = jnp.arange(self.ends.shape[1])
        own = (slots[:, None] >= slots) & (slots[:, None] < self.ends[:, None])
        return jnp.pad(own, ((0, 0), (0, 0), (before, 0)), constant_values=True)
