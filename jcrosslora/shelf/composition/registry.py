"""The ways of composing, by name."""

from jcrosslora.errors import UsageError, suggestion
from jcrosslora.shelf.composition.composition import Composition
from jcrosslora.shelf.composition.fusion import Fusion
from jcrosslora.shelf.composition.gated import Gated
from jcrosslora.shelf.composition.mixture import Mixture
from jcrosslora.shelf.composition.random_gate import RandomGate
from jcrosslora.shelf.composition.router import Router
from jcrosslora.shelf.composition.select import Select
from jcrosslora.shelf.composition.stack import Stack
from jcrosslora.shelf.composition.uniform import Uniform

COMPOSITIONS: dict[str, type[Composition]] = {
    one.name: one for one in (Select, Mixture, Fusion, Gated, Router, Stack, Uniform, RandomGate)
}
_OF_PEFT = ("ties", "dare", "dare_ties", "dare_linear", "magnitude_prune")


def find_composition(how: str | Composition) -> Composition:
    """Return a composition by its name, with its usual settings; one that is an object already as it is.

    Raises:
        UsageError: the name is unknown, or that of a rule which peft has.
    """
    if isinstance(how, Composition):
        return how
    if how in _OF_PEFT:
        msg = f"composition {how!r} is not here: it changes the parameters of adapters by a rule that peft has: write "
        raise UsageError(msg + "one adapter with peft's add_weighted_adapter and take that, or use mixture")
    if how not in COMPOSITIONS:
        msg = (
            f"composition {how!r} is unknown{suggestion(str(how), COMPOSITIONS)}; use one of {', '.join(COMPOSITIONS)}"
        )
        raise UsageError(msg)
    return COMPOSITIONS[how]()
