"""Fits: train an update of the target to reproduce what the adapter does to the source.

Distillation fits the predictions of the adapted source (see `distill`). It starts from zero, from a copy of the update,
or from the rows and columns of the update that a pruned target still has.
"""

from dataclasses import dataclass, replace

from jcrosslora.checkpoint import BaseModel
from jcrosslora.distill.settings import UNPROMPTED, DistillSettings
from jcrosslora.maps import EvidenceKind, MapMethod, Method, Moved, Plan
from jcrosslora.methods.copy import Copy, Select
from jcrosslora.utils.cost import Cost


@dataclass(frozen=True)
class Distill(DistillSettings, Method):
    """An update fitted to completions of the adapted source."""

    name = "distill"
    summary = "an update fitted to the adapted source's predictions"
    when = "for two different models"
    reference = "this package"
    requires = frozenset({EvidenceKind.COMPLETIONS})

    def cost(self, plan: Plan) -> dict[str, Cost | None]:
        """Count the work of writing completions and of the fit; with a budget, only the first completions count."""
        from jcrosslora.distill.completions import completions_cost
        from jcrosslora.distill.fit import fit_cost

        prompts, examples = len(set(plan.prompts)), len(plan.examples)
        asked = self.for_prompts(prompts, examples)
        count = asked.course(prompted=prompts + examples > 0).first
        first = replace(asked, completions=count) if self.budget is not None else asked
        given = {"prompts": prompts, "examples": examples}
        fit = replace(fit_cost(first, **given), budget=self.seconds)
        own = self.own_prompt_count > 0
        written = completions_cost(count, self.answer_tokens, self.discovery, own=own, **given)
        return {"write completions": written, "fit": fit}

    def memory(self, target: BaseModel, free: int | None) -> int:
        """Return the bytes of predictions, activations and factors."""
        from jcrosslora.distill.batches import peak_bytes

        return peak_bytes(target, self, free)

    def move(self, plan: Plan) -> Moved:
        """Let the source write completions with its adapter, and fit an update of the target to them.

        If there is a mapped update, the fit starts from its linear layers, and its other changes stay as they are.
        """
        from jcrosslora.distill.run import distill

        mapped = plan.mapped
        found = distill(
            plan.source,
            plan.target,
            plan.adapter,
            mapped.adapter if mapped is not None and mapped.adapter.modules else None,
            prompts=plan.prompts,
            examples=plan.examples,
            settings=self,
            seed=plan.seed,
            states=plan.states,
            loaded=plan.loaded,
            shared=plan.shared,
        )
        start = Moved(found.adapter) if mapped is None else mapped
        return replace(
            start,
            adapter=replace(start.adapter, modules=found.adapter.modules),
            fit=found.facts,
            curve=[(point.completions, point.divergence) for point in found.curve],
            completions=found.completions,
            wrote_prompts=not (plan.prompts or plan.examples),
            chat_template=found.chat_template,
            warnings=(*start.warnings, *found.warnings),
        )


@dataclass(frozen=True)
class DistilledCopy(Distill):
    """The unchanged update, then factors of all modules fitted on top of it.

    The teacher is the adapted source alone.
    """

    name = "distilled-copy"
    summary = "the unchanged update, then one fitted on top of it to the adapted source's predictions"
    when = "for a base and its 4-bit or pruned copy"
    requires = Copy.requires | Distill.requires
    carries = Copy.carries | Distill.carries

    passes: int | None = UNPROMPTED.passes
    """How often each completion is used."""
    rate: float | None = UNPROMPTED.rate
    """Highest learning rate: the update that the fit starts from needs small steps."""
    answer_temperature: float | None = UNPROMPTED.temperature
    """Temperature at which answers are sampled."""
    teacher_weight: float = 1.0
    """Share of the adapted source's own predictions in the teacher."""
    contrast_weight: float = 0.0
    """Weight of the change that the adapter makes in the source's log-probabilities, on top of that."""

    @property
    def map_method(self) -> MapMethod:
        """Return the copy that the fit starts from."""
        return Copy()


@dataclass(frozen=True)
class DistilledSelect(DistilledCopy):
    """The update of the parts that the target has, then fitted as `distilled-copy` is."""

    name = "distilled-select"
    summary = "the update of the parts that the target has, then all modules fitted to the adapted source"
    when = "for a model cut from the base, without some layers"
    requires = Select.requires | Distill.requires

    @property
    def map_method(self) -> MapMethod:
        """Return the selection that the fit starts from."""
        return Select()
