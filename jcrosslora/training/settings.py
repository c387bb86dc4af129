"""What decides a training run."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from jcrosslora.checkpoint import ROLES
from jcrosslora.errors import UsageError

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a LoRA training; the same settings, examples and base give the same adapter on one machine.

    Attributes:
        steps: updates of the factors.
        batch: examples in an update.
        rate: highest learning rate; it rises over the first 1/20 of the steps, then falls to 0 as a cosine.
        rank: K of every module.
        alpha: the update is alpha / rank * B A.
        modules: roles that get an update.
        seed: of the first factors and of the order of the examples.
        weight_decay: of AdamW.
        clip: the gradient's norm over all factors is cut to this.
        dtype: of the base's weights; the factors and their gradients are float32.
        remat: recompute each layer in the backward pass, which takes less memory and more time.
    """

    steps: int = 160
    batch: int = 8
    rate: float = 1e-3
    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] = ROLES
    seed: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    dtype: Dtype = "bfloat16"
    remat: bool = False

    @property
    def warm_up(self) -> int:
        """Steps over which the learning rate rises."""
        return self.steps // 20

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UsageError: the first such value.
        """
        positive, counted = (lambda value: 0 < value < math.inf), (lambda value: value >= 1)
        rules = {
            "steps": (counted, "1 or more"),
            "batch": (counted, "1 or more"),
            "rank": (counted, "1 or more"),
            "rate": (positive, "a positive number"),
            "alpha": (positive, "a positive number"),
            "clip": (positive, "a positive number"),
            "weight_decay": (lambda value: 0 <= value < math.inf, "a number from 0 on"),
            "seed": (lambda value: 0 <= value < 1 << 32, "an integer from 0 to 2^32 - 1"),
            "dtype": (lambda value: value in get_args(Dtype), f"one of {', '.join(get_args(Dtype))}"),
            "modules": (_are_roles, f"a tuple of different ones of {', '.join(ROLES)}"),
        }
        for name, (makes_sense, wanted) in rules.items():
            if not makes_sense(getattr(self, name)):
                msg = f"training with {name} {getattr(self, name)!r}: wanted {wanted}"
                raise UsageError(msg)


def _are_roles(modules: tuple[str, ...]) -> bool:
    # A list cannot be hashed, which what is compiled for the settings asks for.
    return isinstance(modules, tuple) and 0 < len(modules) == len(set(modules)) and set(modules) <= set(ROLES)
