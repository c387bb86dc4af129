"""The factors that are trained: their initial values, and their forms for the decoder and for an adapter."""

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, AdapterInfo
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.families import ROLE_PATHS
from jcrosslora.decoder import StackedAdapter, StackedFactors, unstack_adapter
from jcrosslora.training.settings import TrainingSettings


def first_factors(base: BaseModel, settings: TrainingSettings) -> StackedAdapter:
    """Initialise A uniformly in +-1/sqrt(I), Kaiming's bound as in PEFT, and B with zeros: training starts at the base.

    The scale is not inside B: AdamW's steps do not scale with the factors.
    """
    layers, rng = base.dims.layers, np.random.default_rng([settings.seed, 1])
    roles = {}
    for role in settings.modules:
        rows, columns = base.modules[f"model.layers.0.{ROLE_PATHS[role]}"].shape
        bound = columns**-0.5
        a = rng.uniform(-bound, bound, (layers, settings.rank, columns)).astype(np.float32)
        roles[role] = StackedFactors(jnp.asarray(a), jnp.zeros((layers, rows, settings.rank), jnp.float32))
    return StackedAdapter(roles)


def scaled(factors: StackedAdapter, scale: float | jax.Array) -> StackedAdapter:
    """Multiply B by the scale, as the decoder wants it."""
    roles = {
        role: StackedFactors(one.a, one.b * jnp.asarray(scale, jnp.float32)) for role, one in factors.roles.items()
    }
    return StackedAdapter(roles)


def to_adapter(factors: StackedAdapter, settings: TrainingSettings, base: BaseModel) -> Adapter:
    """Make an adapter of the factors, the scale inside B."""
    host = jax.device_get(scaled(factors, settings.alpha / settings.rank))
    return Adapter(unstack_adapter(host).modules, AdapterInfo(name=f"trained on {base.name}", base_name=base.name))
