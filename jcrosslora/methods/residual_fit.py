"""Residual fit: down_proj fitted, layer by layer, to the change of the residual stream (see `fit.residual`)."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.adapter import Adapter
from jcrosslora.evidence.records import EvidenceKind
from jcrosslora.methods.base import Measure, Method
from jcrosslora.methods.update import FinalizeContext, Update


@dataclass(frozen=True)
class ResidualFit(Method):
    """Updates of down_proj that change the target's residual stream as the adapter changes the source's."""

    name: ClassVar[str] = "residual-fit"
    summary: ClassVar[str] = "down_proj, layer by layer, so that the target's residual stream changes as the source's"
    reference: ClassVar[str] = "this package"
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset({EvidenceKind.PROBE_TEXTS})
    measure: ClassVar[Measure] = "none"

    residual_scale: float = 0.6
    """Share of the change of the source's residual stream that the update is fitted to."""

    def finalize(self, context: FinalizeContext, moved: Adapter) -> Update:
        """Run both bases over the probe texts and fit each layer in closed form."""
        del moved
        from jcrosslora.decoder import unstack_adapter
        from jcrosslora.fit.residual import fit_residual

        fitted = fit_residual(
            context.source,
            context.target,
            context.adapter,
            None,
            context.batches,
            context.layers,
            scale=self.residual_scale,
            progress=context.progress,
        )
        what = f"{self.residual_scale:g} times the change of the source's residual stream"
        return Update(unstack_adapter(fitted, context.target), fitted=f"fitted to {what}, on down_proj alone")
