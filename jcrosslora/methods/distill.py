"""Distillation: an update of the target fitted to the predictions of the adapted source (see `distill`)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from jcrosslora.distill.settings import DistillSettings
from jcrosslora.maps.evidence.records import EvidenceKind
from jcrosslora.maps.method import Method
from jcrosslora.maps.task import Moved, Sizes, Task
from jcrosslora.utils.cost import Cost


@dataclass(frozen=True)
class Distill(DistillSettings, Method):
    """An update fitted to completions of the adapted source."""

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "an update fitted to the adapted source's predictions"
    reference: ClassVar[str] = "this package"
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset({EvidenceKind.COMPLETIONS})

    def cost(self, sizes: Sizes) -> dict[str, Cost | None]:
        """Count the completions that are written and the fit; where there is a budget, one to the first of them."""
        from jcrosslora.distill.completions import completions_cost
        from jcrosslora.distill.fit import fit_cost

        first = replace(self, completions=self.rounds[0]) if self.budget is not None else self
        fit = replace(fit_cost(first, sizes.prompts), budget=self.seconds)
        return {"write completions": completions_cost(self, sizes.prompts), "fit": fit}

    def move(self, task: Task) -> Moved:
        """Let the source write completions with its adapter, and fit an update of the target to them.

        The fit starts from the mapped update, where there is one.
        """
        from jcrosslora.distill.run import distill

        start = task.start if task.start is not None and task.start.modules else None
        found = distill(
            task.source,
            task.target,
            task.adapter,
            start,
            prompts=task.prompts,
            settings=self,
            seed=task.seed,
            states=task.states,
            loaded=task.loaded,
            shared=task.shared,
        )
        return Moved(
            found.adapter,
            fitted=found.sentence,
            curve=[(look.completions, look.divergence) for look in found.looks],
            completions=found.completions,
            wrote_prompts=not task.prompts,
            chat_template=found.chat_template,
        )
