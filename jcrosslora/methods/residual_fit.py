"""Residual fit: down_proj fitted, layer by layer, to the change of the residual stream (see `distill.residual`)."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.maps.evidence.records import EvidenceKind
from jcrosslora.maps.method import Method, Moved, Sizes, Task
from jcrosslora.utils.cost import Cost


@dataclass(frozen=True)
class ResidualFit(Method):
    """Updates of down_proj that change the target's residual stream as the adapter changes the source's."""

    name: ClassVar[str] = "residual-fit"
    summary: ClassVar[str] = "down_proj, layer by layer, so that the target's residual stream changes as the source's"
    reference: ClassVar[str] = "this package"
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset({EvidenceKind.PROBE_TEXTS})

    residual_scale: float = 0.6
    """Share of the change of the source's residual stream that the update is fitted to."""

    def cost(self, sizes: Sizes) -> dict[str, Cost | None]:
        """Count the passes of both bases over the probe texts."""
        from jcrosslora.distill.residual import residual_cost

        return {"fit the residual stream": residual_cost(sizes.probes)}

    def move(self, task: Task) -> Moved:
        """Run both bases over the probe texts and fit each layer in closed form."""
        from jcrosslora.decoder import unstack_adapter
        from jcrosslora.distill.residual import fit_residual

        fitted = fit_residual(
            task.base,
            task.target,
            task.adapter,
            None,
            task.batches,
            task.layers,
            scale=self.residual_scale,
        )
        what = f"{self.residual_scale:g} times the change of the source's residual stream"
        return Moved(unstack_adapter(fitted, task.target), fitted=f"fitted to {what}, on down_proj alone")
