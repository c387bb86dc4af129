"""The dense MLP of a layer, with or without a gate."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from jcrosslora.architectures.blocks.block import Block, Linear
from jcrosslora.architectures.cache import KVCache
from jcrosslora.architectures.run import Run

_WIDE = "wide_"  # in front of the roles of layers whose MLP is wider than that of others


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
        hidden: features of the stream.
        width: features inside.
        gated: whether the activation is that of a gate.
        wide: whether its width is not that of the other layers, so that its weights are stacked on their own.
    """

    hidden: int
    width: int
    gated: bool = True
    wide: bool = False

    LINEARS: ClassVar = (*_linears(""), *_linears(_WIDE))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return role -> (O, I)."""
        inside, group = (self.width, self.hidden), _WIDE if self.wide else ""
        gate = {f"{group}gate_proj": inside} if self.gated else {}
        return gate | {f"{group}up_proj": inside, f"{group}down_proj": (self.hidden, self.width)}

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run the MLP; see `Block.forward`."""
        group = _WIDE if self.wide else ""
        gate = run.module(f"{group}gate_proj", x) if self.gated else None
        up = run.module(f"{group}up_proj", x)
        inner = run.activate(up) if gate is None else run.activate(gate) * up
        return run.module(f"{group}down_proj", inner), cache
