"""Several adapters of one base at once: chosen by prompt, mixed, gated or routed by token."""

from jcrosslora.shelf.composition.compose import Additions as Additions
from jcrosslora.shelf.composition.compose import add_in_turn as add_in_turn
from jcrosslora.shelf.composition.compose import compose as compose
from jcrosslora.shelf.composition.compose import load_composition as load_composition
from jcrosslora.shelf.composition.composed import RATE as RATE
from jcrosslora.shelf.composition.composed import Composed as Composed
from jcrosslora.shelf.composition.composed import Weights as Weights
from jcrosslora.shelf.composition.composition import Composition as Composition
from jcrosslora.shelf.composition.composition import stack_for as stack_for
from jcrosslora.shelf.composition.fit import loss_and_gradient as loss_and_gradient
from jcrosslora.shelf.composition.fit import mean_divergence as mean_divergence
from jcrosslora.shelf.composition.ways import COMPOSITIONS as COMPOSITIONS
from jcrosslora.shelf.composition.ways import Gated as Gated
from jcrosslora.shelf.composition.ways import Mixture as Mixture
from jcrosslora.shelf.composition.ways import Router as Router
from jcrosslora.shelf.composition.ways import Select as Select
from jcrosslora.shelf.composition.ways import Stack as Stack
from jcrosslora.shelf.composition.ways import Uniform as Uniform
from jcrosslora.shelf.composition.ways import find_composition as find_composition
