"""The ways of composing, by name."""

from jcrosslora.composition.composition import Composition
from jcrosslora.composition.fusion import Fusion
from jcrosslora.composition.gated import Gated
from jcrosslora.composition.mixture import Mixture
from jcrosslora.composition.random_gate import RandomGate
from jcrosslora.composition.router import Router
from jcrosslora.composition.select import Select
from jcrosslora.composition.stack import Stack
from jcrosslora.composition.uniform import Uniform
from jcrosslora.errors import UsageError, suggestion

COMPOSITIONS: dict[str, type[Composition]] = {
    one.name: one for one in (Select, Mixture, Fusion, Gated, Router, Stack, Uniform, RandomGate)
}


def find_composition(how: str | Composition) -> Composition:
    """Return a composition by its name, with its usual settings; one that is an object already as it is.

    Raises:
        UsageError: the name is unknown.
    """
    if isinstance(how, Composition):
        return how
    if how not in COMPOSITIONS:
        msg = (
            f"composition {how!r} is unknown{suggestion(str(how), COMPOSITIONS)}; use one of {', '.join(COMPOSITIONS)}"
        )
        raise UsageError(msg)
    return COMPOSITIONS[how]()
