"""Distillation: an update of the target fitted to the predictions of the adapted source (see `fit.distill`)."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.adapter import Adapter, update_norm
from jcrosslora.evidence.records import EvidenceKind
from jcrosslora.fit.distill.settings import DistillSettings
from jcrosslora.methods.base import Measure, Method
from jcrosslora.methods.update import FinalizeContext, Update


@dataclass(frozen=True)
class Distill(DistillSettings, Method):
    """An update fitted to completions of the adapted source."""

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "an update fitted to the adapted source's predictions"
    reference: ClassVar[str] = "this package"
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset({EvidenceKind.COMPLETIONS})
    measure: ClassVar[Measure] = "none"

    def finalize(self, context: FinalizeContext, moved: Adapter) -> Update:
        """Let the source write completions with its adapter, and fit the update of the target to them."""
        from jcrosslora.fit.distill.run import distill

        start = moved if any(update_norm(item) > 0 for item in moved.modules.values()) else None
        found = distill(
            context.source,
            context.target,
            context.adapter,
            start,
            prompts=context.prompts,
            settings=self,
            seed=context.seed,
            states=context.states,
            progress=context.progress,
            loaded=context.loaded,
            shared=context.shared,
        )
        return Update(
            found.adapter,
            fitted=found.sentence,
            curve=[(look.completions, look.divergence) for look in found.looks],
            completions=found.completions,
            wrote_prompts=not context.prompts,
            chat_template=found.chat_template,
        )
