"""Several adapters of one base at once: chosen by prompt, mixed, gated or routed by token."""

from jcrosslora.shelf.composition.compose import compose, load_composition
from jcrosslora.shelf.composition.composed import Composed
from jcrosslora.shelf.composition.composition import Composition
from jcrosslora.shelf.composition.fusion import Fusion
from jcrosslora.shelf.composition.gated import Gated
from jcrosslora.shelf.composition.in_turn import Additions, add_in_turn
from jcrosslora.shelf.composition.mixture import Mixture
from jcrosslora.shelf.composition.random_gate import RandomGate
from jcrosslora.shelf.composition.registry import COMPOSITIONS, find_composition
from jcrosslora.shelf.composition.router import Router
from jcrosslora.shelf.composition.select import Select
from jcrosslora.shelf.composition.stack import Stack
from jcrosslora.shelf.composition.uniform import Uniform

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
