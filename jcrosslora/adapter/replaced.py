"""Tensors of an adapter that replace those of its own base: trained biases, norms, and whole linear layers.

They have no low rank and do not move to another base; on their own base they are exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jcrosslora.adapter.factors import Array
from jcrosslora.adapter.pytrees import register_change


@register_change(arrays=("tensors",), account=("share",))
@dataclass(frozen=True, eq=False)
class ReplacedTensors:
    """New tensors of the base of one kind of change, as a pytree whose leaves they are.

    Attributes:
        kind: the tensors that they were read from: "full", "bias" or "lora_bias" of `ignored.CHANGES`.
        tensors: a dict from the base's name of each tensor to its new values, of the base's shape.
        share: of the whole adapter's squared Frobenius norm that the change has; None if it is not known.
    """

    kind: str
    tensors: Mapping[str, Array]
    share: float | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that change."""
        return tuple(name.rpartition(".")[0] for name in self.tensors)
