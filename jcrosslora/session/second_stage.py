"""What some methods do with an adapter when it has been moved: a fit that runs both bases, or part of the source interpolation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jcrosslora.adapter import Adapter, fuse, split_fused, update_norm
from jcrosslora.adapter.sums import add_factors
from jcrosslora.checkpoint import BaseModel
from jcrosslora.fit.interpolation import SHARE, SourceInterpolation, interpolate_to_source
from jcrosslora.methods import Method
from jcrosslora.shifting.shift import MovedAdapter, cut_moved

if TYPE_CHECKING:
    from jcrosslora.evidence.probes import ProbeBatch

RESIDUAL_SCALE = 0.6
# Source interpolations between two bases at one rank, by the share that is taken.
Ways = dict[float, SourceInterpolation]


def fit_behind(
    method: Method,
    source: BaseModel,
    target: BaseModel,
    adapter: Adapter,
    moved: MovedAdapter,
    *,
    prompts: Sequence[str] = (),
    batches: Sequence[ProbeBatch] = (),
    completions: int | None = None,
    interpolation: float = SHARE,
    ways: Ways | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[MovedAdapter, tuple[str, ...]]:
    """The moved adapter with what its method puts behind the maps; the same one for methods of maps alone.

    What is put there is cut as the moved adapter's report says (`out_rank`).

    Args:
        method: of the move.
        source: the base that `adapter` is of.
        target: the base that `moved` is for.
        adapter: the original, with fused matrices taken apart (see `fit_to_base`).
        moved: what the maps made of it, with its report.
        prompts: for a fit to predictions: text that answers are to follow; without any the source writes its own.
        batches: for a fit to the residual stream: probe texts.
        completions: for a fit to predictions: how many prompts with answers; None is the usual number.
        interpolation: for a source interpolation: the share of it that is taken.
        ways: those of earlier adapters, from the same source to the same target; a new one is added to them.
        seed: of what is sampled.
        progress: whether to show progress bars.

    Returns:
        The adapter, and the texts that the source wrote with the original for the fit, if it did.

    Raises:
        JCrossLoRAError: see `jcrosslora.fit.distill.distill` and `jcrosslora.fit.residual.fit_residual`.
    """
    if method.then == "nothing":
        return moved, ()
    if method.then == "source interpolation":
        ways = {} if ways is None else ways
        if interpolation not in ways:
            assert moved.report is not None
            ways[interpolation] = interpolate_to_source(
                source, target, interpolation, rank=moved.report.recipe.rank, progress=progress
            )
        return _cut(_with_interpolation(target, moved, ways[interpolation], interpolation)), ()
    start = moved if any(update_norm(item) > 0 for item in moved.modules.values()) else None
    if method.then == "residual":
        assert moved.report is not None
        found, sentence = _residual(source, target, adapter, start, batches, moved.report.layers, progress)
        return _cut(_reported(moved, found, sentence, None)), ()
    from jcrosslora.fit.distill import DistillSettings, distill

    settings = DistillSettings() if completions is None else DistillSettings(completions=completions)
    if method.teacher == "source":
        settings = dataclasses.replace(settings, teacher_weight=1.0, contrast_weight=0.0)
    distilled = distill(
        source, target, adapter, start, prompts=prompts, settings=settings, seed=seed, progress=progress
    )
    return _cut(_reported(moved, distilled.adapter, distilled.sentence, settings.completions)), distilled.texts


def _cut(moved: MovedAdapter) -> MovedAdapter:
    return moved if moved.report is None or moved.report.out_rank is None else cut_moved(moved)


def _with_interpolation(
    target: BaseModel, moved: MovedAdapter, found: SourceInterpolation, share: float
) -> MovedAdapter:
    assert moved.report is not None
    # Parts of a fused matrix that share their A go on sharing it: added one by one, each would bring all of it along.
    terms = [fuse(part, target.fused) for part in (moved.modules, found.modules)]
    whole = {name: add_factors(name, [part[name] for part in terms if name in part]) for name in terms[0] | terms[1]}
    parts = split_fused(Adapter(whole), target.fused).modules
    modules = {name: parts[name] for name in target.modules if name in moved.modules or name in found.modules}
    norms = {name: update_norm(factors) for name, factors in modules.items()}
    rows = tuple(dataclasses.replace(row, norm_after=norms[row.target]) for row in moved.report.rows)
    report = dataclasses.replace(moved.report, rows=rows, added=_added(found, share), interpolation=share)
    return dataclasses.replace(moved, modules=modules, report=report)


def _added(found: SourceInterpolation, share: float) -> str:
    """What goes with a copy, in words, without a full stop."""
    way = "of the source interpolation from the target's weights to the source's goes with the copy"
    if not found.modules:
        return f"nothing {way}: {'the two have the same weights in all modules' if share else 'none was asked for'}"
    highest = max(factors.rank for factors in found.modules.values())
    return (
        f"{share:.0%} {way}, in {len(found.modules)} modules and ranks up to {highest}, which hold {found.kept:.1%} of "
        f"the difference; of what they hold of its further training the target gives up {share:.0%} while the adapter "
        "is on"
    )


def _residual(
    source: BaseModel,
    target: BaseModel,
    adapter: Adapter,
    start: Adapter | None,
    batches: Sequence[ProbeBatch],
    layers: Sequence[int | None],
    progress: bool,
) -> tuple[Adapter, str]:
    from jcrosslora.decoder import join_stacked, stack_adapter, unstack_adapter
    from jcrosslora.fit.residual import fit_residual

    current = None if start is None else stack_adapter(start, target)
    fitted = fit_residual(source, target, adapter, current, batches, layers, scale=RESIDUAL_SCALE, progress=progress)
    whole = fitted if current is None else join_stacked(current, fitted)
    sentence = f"fitted to {RESIDUAL_SCALE:g} times the change of the source's residual stream, on down_proj alone"
    return unstack_adapter(whole), sentence


def _reported(moved: MovedAdapter, found: Adapter, sentence: str, completions: int | None) -> MovedAdapter:
    assert moved.report is not None
    norms = {name: update_norm(factors) for name, factors in found.modules.items()}
    # What a map kept is no figure of an update that was fitted.
    rows = tuple(
        dataclasses.replace(row, kept=math.nan, norm_after=norms.get(row.target, 0.0)) for row in moved.report.rows
    )
    # Nor is anything left behind: the fit sees what the whole adapter does.
    report = dataclasses.replace(moved.report, rows=rows, unmapped_sources=(), fitted=sentence, completions=completions)
    return dataclasses.replace(moved, modules=found.modules, report=report)
