"""What is known of a base model without its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.wrapped import TEXT


@dataclass(frozen=True, eq=False)
class BaseInfo:
    """What is known of a base model without its weights.

    Attributes:
        name: as written into `base_model_name_or_path`.
        ref: the path or hub id that was opened.
        revision: the hub commit, or None.
        digest: "sha256:..." of the weight files; "" where they were not read for it.
        family: name of its family.
        shapes: (O, I) of every module, by name, in the order of the model.
        fused: matrices that hold several modules, see `BaseModel.fused`.
        heads: (query heads, key heads).
        has_experts: whether a layer has experts.
        prefix: of the names that its class gives to modules, see `BaseModel.prefix`.
    """

    name: str
    ref: str
    revision: str | None
    digest: str
    family: str
    shapes: Mapping[str, tuple[int, int]]
    fused: Mapping[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)
    heads: tuple[int, int] | None = None
    has_experts: bool = False
    prefix: str = TEXT


def describe_base(base: BaseModel, *, digest: str | None = None) -> BaseInfo:
    """Take down what `BaseInfo` holds.

    Args:
        base: the base.
        digest: of its weights, or "" where that is not wanted; None reads the weight files once.
    """
    return BaseInfo(
        name=base.name,
        ref=base.ref,
        revision=base.revision,
        digest=base.digest() if digest is None else digest,
        family=base.family.name,
        shapes={name: module.shape for name, module in base.modules.items()},
        fused=base.fused,
        heads=(base.dims.heads, base.dims.kv_heads),
        has_experts=base.has_experts,
        prefix=base.prefix,
    )
