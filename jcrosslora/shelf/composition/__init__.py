"""Several adapters of one base at once: chosen by prompt, mixed, gated or routed by token."""

from jcrosslora.shelf.composition.compose import Additions, add_in_turn, compose, load_composition
from jcrosslora.shelf.composition.composed import RATE, Composed, Weights
from jcrosslora.shelf.composition.composition import Composition, stack_for
from jcrosslora.shelf.composition.fit import loss_and_gradient, mean_divergence
from jcrosslora.shelf.composition.ways import (
    COMPOSITIONS,
    Fusion,
    Gated,
    Mixture,
    RandomGate,
    Router,
    Select,
    Stack,
    Uniform,
    find_composition,
)

__all__ = [
    "COMPOSITIONS",
    "RATE",
    "Additions",
    "Composed",
    "Composition",
    "Fusion",
    "Gated",
    "Mixture",
    "RandomGate",
    "Router",
    "Select",
    "Stack",
    "Uniform",
    "Weights",
    "add_in_turn",
    "compose",
    "find_composition",
    "load_composition",
    "loss_and_gradient",
    "mean_divergence",
    "stack_for",
]
