"""The gated short convolution of LFM2."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jcrosslora.architectures.blocks.block import Linear, Tensor
from jcrosslora.architectures.blocks.recurrent import Inside, RecurrentBlock, RecurrentState, causal_convolution


@dataclass(frozen=True)
class ShortConvolution(RecurrentBlock):
    """A convolution between two gates. It has no heads, and its state is the last inputs alone."""

    LINEARS: ClassVar = (
        Linear("conv_in_proj", "conv.in_proj", "conv_in", "attn", "shortconv.in_proj"),
        Linear("conv_out_proj", "conv.out_proj", "conv_out_in", "attn_post", "shortconv.out_proj", stream="writes"),
    )

    @property
    def convolved(self) -> int:
        """C, features that the convolution takes."""
        return self.hidden

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return role -> (O, I)."""
        return {"conv_in_proj": (3 * self.hidden, self.hidden), "conv_out_proj": (self.hidden, self.hidden)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the convolution."""
        return self.of_convolution("conv.conv")

    def mix(
        self, inside: Inside, x: jax.Array, state: RecurrentState, valid: jax.Array
    ) -> tuple[jax.Array, RecurrentState]:
        """Run the block as `Lfm2ShortConv` of transformers; see `RecurrentBlock.mix`."""
        before, behind, inner = jnp.split(inside.project("conv_in_proj", x).astype(jnp.float32), 3, axis=-1)
        weight, bias = inside.tensors["conv"], inside.tensors.get("conv_bias")
        convolve = jax.vmap(causal_convolution, (0, None, None, 0, 0))
        mixed, inputs = convolve(before * inner, weight, bias, state.inputs, valid)
        return inside.project("conv_out_proj", (behind * mixed).astype(x.dtype)), RecurrentState(inputs, state.matrices)
