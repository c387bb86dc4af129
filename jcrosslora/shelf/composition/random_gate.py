"""A control: the gate of AutoLoRA as it is drawn, without training."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jcrosslora.shelf.composition.gated import Gated, plain_norms
from jcrosslora.shelf.composition.updates import Arrays, RoleSizes


@dataclass(frozen=True)
class RandomGate(Gated):
    """A control: the gate with the numbers that AutoLoRA draws before training, and no training."""

    name: ClassVar[str] = "random-gate"
    reference: ClassVar[str] = "control"
    trained: ClassVar[bool] = False

    def first_arrays(self, sizes: RoleSizes, count: int, seed: int) -> Arrays:
        """Draw the weights and the bias of the gate from a normal distribution; w_o is 1."""
        del count
        rng, shape = np.random.default_rng(seed), (sizes.layers, sizes.out)
        names = "weight_base", "weight_lora", "weight_cross", "bias"
        drawn = {name: jnp.asarray(rng.normal(size=shape).astype(np.float32)) for name in names}
        return drawn | plain_norms(shape) | {"weight_out": jnp.ones(shape, jnp.float32)}
