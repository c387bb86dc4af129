"""The sizes of a base's weights in memory, by its configuration; no weight is read."""

from math import prod

from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder.sharding import divided_axis

_MATRICES = ("gate_up", "down")


def stack_shapes(base: BaseModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of matrices in `Params`, by the names of `divided_axis`.

    Returns:
        Role -> (L, O, I) of the L layers that have it; "gate_up" and "down" of experts -> (L, E, O, I); "embedding",
        "head" of a model that is not tied, and "layer_embedding" -> (V, columns).
    """
    dims, family, experts = base.dims, base.family, len(base.layers_with("router"))
    found: dict[str, tuple[int, ...]] = {"embedding": (dims.vocab, dims.hidden)}
    if not base.tied:
        found["head"] = (dims.vocab, dims.hidden)
    if features := family.layer_inputs(base.config):
        found["layer_embedding"] = (dims.vocab, dims.layers * features)
    for role in family.roles:
        if layers := base.layers_with(role):
            found[role] = (len(layers), *base.role_shape(role))
    if family.experts is not None and experts:
        found |= {name: (experts, *base.expert_shape(name)) for name in _MATRICES}
    return found


def held_numbers(base: BaseModel, devices: int = 1) -> int:
    """Count the numbers of a base's weights on each of the devices that they are divided over."""
    shapes = stack_shapes(base)
    small = sum(map(prod, base.tensor_shapes().values())) - sum(map(prod, shapes.values()))
    parts = (
        prod(shape) // (1 if divided_axis(name, shape, devices) is None else devices) for name, shape in shapes.items()
    )
    return small + sum(parts)
