"""The settings of a LoRA training."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from jcrosslora.checkpoint import ROLES
from jcrosslora.errors import UsageError

Dtype = Literal["bfloat16", "float32"]
Optimizer = Literal["adamw", "lora-rite"]


@dataclass(frozen=True)
class TrainingSettings:
    """How `train_lora` trains; the same settings, examples and base give the same adapter on one kind of machine."""

    steps: int = 160
    """Updates of the factors."""
    batch: int = 8
    """Examples in an update."""
    rate: float = 1e-3
    """Highest learning rate; it rises over the first 1/20 of the steps, then falls to 0 as a cosine."""
    rank: int = 8
    """Rank of the adapter in every module."""
    alpha: float = 16.0
    """The update is alpha / rank * B A."""
    modules: tuple[str, ...] | None = None
    """Roles that get an update; those that the base does not have are left out. None: all that it has."""
    seed: int = 0
    """Seed of the first factors and of the order of the examples."""
    optimizer: Optimizer = "adamw"
    """AdamW, or LoRA-RITE, whose steps do not depend on how an update is split into its factors."""
    weight_decay: float = 0.0
    """Weight decay of the optimiser."""
    clip: float = 1.0
    """The norm of the gradient over all factors is clipped to this; in LoRA-RITE, that of its unmagnified gradient."""
    dtype: Dtype = "bfloat16"
    """Dtype of the base's weights; the factors and their gradients are float32."""
    remat: bool = False
    """Recompute each layer in the backward pass, which takes less memory and more time."""

    @property
    def warm_up(self) -> int:
        """Steps over which the learning rate rises."""
        return self.steps // 20

    def check(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a setting is out of range.
        """
        positive, counted = (lambda value: 0 < value < math.inf), (lambda value: value >= 1)
        rules = {
            "steps": (counted, "1 or more"),
            "batch": (counted, "1 or more"),
            "rank": (counted, "1 or more"),
            "rate": (positive, "a positive number"),
            "alpha": (positive, "a positive number"),
            "clip": (positive, "a positive number"),
            "optimizer": (lambda value: value in get_args(Optimizer), f"one of {', '.join(get_args(Optimizer))}"),
            "weight_decay": (lambda value: 0 <= value < math.inf, "a number from 0 on"),
            "seed": (lambda value: 0 <= value < 1 << 32, "an integer from 0 to 2^32 - 1"),
            "dtype": (lambda value: value in get_args(Dtype), f"one of {', '.join(get_args(Dtype))}"),
            "modules": (_are_roles, f"a tuple of different ones of {', '.join(ROLES)}"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds(getattr(self, name)):
                msg = f"training with {name} {getattr(self, name)!r}: wanted {wanted}"
                raise UsageError(msg)


def _are_roles(modules: tuple[str, ...] | None) -> bool:
    if modules is None:
        return True
    # Compiled functions are cached by the settings, and a list cannot be hashed.
    return isinstance(modules, tuple) and 0 < len(modules) == len(set(modules)) and set(modules) <= set(ROLES)
