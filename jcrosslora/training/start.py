"""Initialise a training run with new factors or those of an adapter, and turn the trained factors into an adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, AdapterInfo, Carried, LoRAFactors, fit_to_base
from jcrosslora.adapter.names import ending
from jcrosslora.adapter.origin import other_model
from jcrosslora.adapter.records import check_always_active, left_out
from jcrosslora.checkpoint import BaseModel, describe_base, module_name, roles_named
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.decoder import StackedAdapter, StackedFactors, stack_adapter, unstack_adapter
from jcrosslora.errors import AdapterError, UsageError
from jcrosslora.training.batches import Scale, scaled
from jcrosslora.training.checkpoints import TrainingSettings
from jcrosslora.utils.digests import sha256


@dataclass(frozen=True, eq=False)
class Start:
    """What a training starts from.

    Attributes:
        factors: float32 A and B, without the scale.
        identity: its part of the run's identity: rank and alpha, or the digest of an adapter.
    """

    factors: StackedAdapter
    scale: Scale
    identity: Mapping[str, Any]


def fresh(base: BaseModel, settings: TrainingSettings) -> Start:
    """Start from the base alone; raise the errors of `first_factors`."""
    rank, alpha = settings.size
    return Start(first_factors(base, settings), alpha / rank, {"rank": rank, "alpha": alpha})


def first_factors(base: BaseModel, settings: TrainingSettings) -> StackedAdapter:
    """Initialise A uniformly in +-1/sqrt(I), Kaiming's bound as in PEFT, and B with zeros: training starts at the base.

    The scale is not inside B: the steps of AdamW do not scale with it. Raises UsageError if the base has none of
    the modules.
    """
    rng, (rank, _) = np.random.default_rng([settings.seed, 1]), settings.size
    shapes = base.architecture.role_shapes
    roles = {}
    for role in roles_named(settings.modules, shapes):
        layers, (rows, columns) = len(base.layers_with(role)), shapes[role]
        bound = columns**-0.5
        a = rng.uniform(-bound, bound, (layers, rank, columns)).astype(np.float32)
        roles[role] = StackedFactors(jnp.asarray(a), jnp.zeros((layers, rows, rank), jnp.float32))
    return StackedAdapter(roles)


def continued(base: BaseModel, adapter: Adapter, settings: TrainingSettings) -> Start:
    """Start from the factors of an adapter, as PEFT does: only its modules, each with its rank and scale.

    Raises AdapterError if it is not a plain LoRA of linear layers, or is for another base, and UsageError if the
    settings ask for another rank, alpha or other modules.
    """
    _check_plain(adapter)
    _check_base(adapter, base)
    adapter = fit_to_base(adapter, describe_base(base, digest=""))
    unscaled = {name: replace(one, scale=1.0) for name, one in adapter.modules.items()}
    factors = stack_adapter(replace(adapter, modules=unscaled), base)
    _check_size(adapter, settings)
    scale = {role: _scales(adapter.modules, base, role) for role in factors.roles}
    numbers = (np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((factors, scale)))
    return Start(factors, scale, {"start": sha256(*numbers), **dict.fromkeys(("rank", "alpha", "modules"))})


def to_adapter(factors: StackedAdapter, scale: Scale, base: BaseModel) -> Adapter:
    """Make an adapter from the factors, with the scale inside B."""
    host = jax.device_get(scaled(factors, scale))
    info = AdapterInfo(f"trained on {base.name}", base.name, prefix=base.prefix)
    return Adapter(unstack_adapter(host, base).modules, info)


def _scales(modules: Mapping[str, LoRAFactors], base: BaseModel, role: str) -> jax.Array:
    """Return the scale of each layer's update, float32 (L, 1, 1); 1 for layers without one (zero factors)."""
    names = (module_name(layer, role) for layer in base.layers_with(role))
    found = [modules[name].scale if name in modules else 1.0 for name in names]
    return jnp.asarray(np.array(found, np.float32)[:, None, None])


def _check_plain(adapter: Adapter) -> None:
    info = adapter.info
    check_always_active(adapter, "which training does not know: give a plain LoRA")
    if info.read_as is not None:
        msg = f"{info.name}: is a {info.kind}, and training goes on from a plain LoRA: "
        raise AdapterError(msg + "write it as one with `jcrosslora export`, or train without --start")
    if more := (*left_out(adapter, Carried.LINEAR, ""), *info.ignored):
        msg = f"{info.name}: has more than updates of linear layers, from which alone training goes on "
        raise AdapterError(msg + f"({more[0].rstrip('.')}): give a plain LoRA, or train without --start")


def _check_base(adapter: Adapter, base: BaseModel) -> None:
    """Refuse an adapter whose file names another model; `fit_to_base` only checks names and shapes of modules."""
    stated = adapter.info.base_name
    if stated is not None and (evidence := other_model(stated, base.name)) is not None:
        msg = f"{adapter.info.name}: names {stated} as its base, and {public_name(base.name)} is another ({evidence}): "
        raise AdapterError(msg + "give the base it was trained on")


def _check_size(adapter: Adapter, settings: TrainingSettings) -> None:
    """Refuse settings whose rank, alpha or modules are not the adapter's."""
    updates = adapter.modules.items()
    has = {
        "rank": {f"{one.rank}" for _, one in updates},
        "alpha": {f"{one.scale * one.rank:g}" for _, one in updates},
        "modules": {ending(name) for name, _ in updates},
    }
    asked = {
        "rank": {f"{settings.rank}"},
        "alpha": {f"{settings.alpha or 0:g}"},
        "modules": set(settings.modules or ()),
    }
    for setting, own in has.items():
        if getattr(settings, setting) is not None and asked[setting] != own:
            wanted, found = (", ".join(sorted(each)) for each in (asked[setting], own))
            msg = f"{setting} {wanted} was asked for, and {adapter.info.name}, where training starts, has {found}: "
            raise UsageError(msg + f"leave --{setting} out")
