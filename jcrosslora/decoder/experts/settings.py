"""The settings of a model's experts; they are hashable, and static under jit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jcrosslora.checkpoint.config import read_number
from jcrosslora.checkpoint.family.experts import Experts
from jcrosslora.errors import CheckpointError


@dataclass(frozen=True)
class ExpertSettings:
    """How a model chooses and runs its experts.

    Attributes:
        count: E, number of experts.
        used: number of experts that a token goes through.
        width: I, the features inside one.
        scores: see `Experts.scores`; those of this model.
        normalised: whether the weights of a token's experts sum to 1.
        sum_eps: added to their sum.
        tolerance: see `Experts.tolerance`; None for other scores than "in turn".
        scale: factor on the weights.
        scaled_inputs: whether the weights are factors on what the experts read.
        averaged: whether the output is the mean of that of the chosen and of the shared experts, instead of the sum.
        groups: number of groups of experts.
        used_groups: number of groups that a token may use.
        group_best: see `Experts.group_best`.
        gated: whether experts have a gate.
        clamp: alpha and limit of the activation, see `Experts.clamp`; None for the model's activation.
    """

    count: int
    used: int
    width: int
    scores: str
    normalised: bool
    sum_eps: float
    tolerance: float | None
    scale: float
    scaled_inputs: bool
    averaged: bool
    groups: int
    used_groups: int
    group_best: int
    gated: bool
    clamp: tuple[float, float] | None


def expert_settings(experts: Experts | None, config: Mapping[str, Any], ref: str) -> ExpertSettings | None:
    """Read the settings of a model's experts; None without any.

    Raises:
        CheckpointError: a number is missing or out of range.
    """
    if experts is None:
        return None
    sizes, stated, clamp = experts.sizes(config), experts.normalised, experts.clamp
    return ExpertSettings(
        count=sizes.number,
        used=sizes.used,
        width=sizes.width,
        scores=_scores(experts, config, ref),
        normalised=bool(config.get(stated)) if isinstance(stated, str) else stated,
        sum_eps=experts.sum_eps,
        tolerance=None if experts.tolerance is None else read_number(config, experts.tolerance, ref),
        scale=1.0 if experts.scale is None else read_number(config, experts.scale, ref),
        scaled_inputs=experts.scaled_inputs,
        averaged=experts.averages(config),
        groups=sizes.groups,
        used_groups=sizes.used_groups,
        group_best=experts.group_best,
        gated=experts.gated,
        clamp=clamp and (read_number(config, clamp[0], ref), read_number(config, clamp[1], ref)),
    )


def _scores(experts: Experts, config: Mapping[str, Any], ref: str) -> str:
    try:
        return experts.scores_of(config)
    except CheckpointError as error:
        msg = f"{ref}: {error}"
        raise CheckpointError(msg) from None
