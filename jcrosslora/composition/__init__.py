"""Several adapters of one base at once: chosen by prompt, mixed, gated or routed by token."""

from jcrosslora.composition.compose import compose, load_composition
from jcrosslora.composition.composed import Composed
from jcrosslora.composition.composition import Composition
from jcrosslora.composition.fusion import Fusion
from jcrosslora.composition.gated import Gated
from jcrosslora.composition.in_turn import Additions, add_in_turn
from jcrosslora.composition.mixture import Mixture
from jcrosslora.composition.random_gate import RandomGate
from jcrosslora.composition.registry import COMPOSITIONS, find_composition
from jcrosslora.composition.router import Router
from jcrosslora.composition.select import Select
from jcrosslora.composition.stack import Stack
from jcrosslora.composition.uniform import Uniform

__all__ = [
    "COMPOSITIONS",
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
    "add_in_turn",
    "compose",
    "find_composition",
    "load_composition",
]
