"""The record of a plan for reports: its settings with their outcomes, and warnings."""

from collections.abc import Iterator, Sequence

from jcrosslora.adapter import Carried
from jcrosslora.checkpoint import BaseInfo, BaseModel, describe_base
from jcrosslora.linalg import describe_kernels
from jcrosslora.maps.evidence import EvidenceKind
from jcrosslora.maps.groups import TransportGroup
from jcrosslora.maps.method import Plan
from jcrosslora.maps.transport import AlignRecipe, OpenedBases, Transport
from jcrosslora.relation.wording import OTHER_GAINS


def source_info(plan: Plan) -> BaseInfo:
    """Describe the source; of a queried source only name and reference are known."""
    if plan.queried is None:
        return describe_base(plan.pair.source)
    name, ref = plan.queried.name, plan.queried.ref
    return BaseInfo(name=name, ref=ref, revision=None, digest="", family="not read", shapes={})


def transport_of(plan: Plan, groups: tuple[TransportGroup, ...]) -> Transport:
    """Make a transport of the groups of an alignment and the record of how they were made."""
    return Transport(
        groups=groups,
        method=plan.method,
        recipe=recipe_of(plan, [kernel for group in groups for kernel in group.kernels]),
        source=source_info(plan),
        target=describe_base(plan.target),
        pairing=plan.pairing,
        bases=OpenedBases(*plan.pair),
        warnings=tuple(warnings_of(plan)),
    )


def recipe_of(plan: Plan, kernels: Sequence[str] = ()) -> AlignRecipe:
    """Return the settings with their outcomes; `kernels` decomposed the matrices of all groups."""
    requires = plan.method.requires
    anchors = EvidenceKind.SHARED_VOCABULARY in requires
    tokens = plan.pair.shared_tokens[0] if anchors else 0
    probes = plan.probes if plan.method.runs_bases else None
    return AlignRecipe(
        method=plan.method.spec(),
        settings=plan.method.settings() | ({"svd_rank": plan.rank} if plan.method.truncates else {}),
        depth=plan.depth,
        seed=plan.seed,
        signs="not needed" if not anchors else "vocabulary" if tokens else "rule",
        shared_tokens=tokens,
        probes="none" if probes is None else probes.describe(),
        prompts=None if probes is None else probes.path,
        examples=None if probes is None else probes.examples_path,
        example_count=0 if probes is None else len(probes.examples),
        probe_count=len(probes.texts) if probes is not None and probes.seed is not None else None,
        svd=describe_kernels(list(kernels)) if EvidenceKind.SINGULAR_VECTORS in requires else "not needed",
    )


def warnings_of(plan: Plan) -> Iterator[str]:
    """Yield the warnings that are known before anything is moved."""
    target = plan.target
    if plan.queried is None:
        yield from _warnings_of_source(plan, plan.pair.source)
    yield from (f"target base: {note}" for note in target.notes)
    if target.wrapper is not None:
        yield (
            f"the adapter's names are those of the target's class, {target.wrapper.architecture}; on its text "
            "model alone it would do nothing: write it for that with `jcrosslora export --base`"
        )


def _warnings_of_source(plan: Plan, source: BaseModel) -> Iterator[str]:
    yield from (f"source base: {note}" for note in source.notes)
    if EvidenceKind.SHARED_VOCABULARY in plan.method.requires and not plan.pair.shared_tokens[0]:
        yield (
            f"the signs of the singular vectors are not anchored ({plan.pair.shared_tokens[1]}); they follow a "
            "rule that depends on the basis, so the moved update is one of many equally valid ones"
        )
    follows = EvidenceKind.CHANNEL_SCALES in plan.method.requires
    if follows and plan.pair.has_other_gains:
        yield f"{OTHER_GAINS}; the update may do something else on the target: check it with `jcrosslora evaluate`"
    names = plan.pair.token_names if Carried.TOKENS in plan.method.carries else None
    if names is not None and names.contradict:
        yield (
            f"{names.sentence}; rows of embedding and head are carried over by id, and one of the two tokenizers "
            "does not belong to its base: check both"
        )
