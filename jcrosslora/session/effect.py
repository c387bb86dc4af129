"""The check at the end of a transfer: what the moved adapter changes on the target beside the original on the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jcrosslora.adapter import Adapter
from jcrosslora.errors import CheckpointError, ShortMemoryError, UsageError
from jcrosslora.evidence.base_pair import BasePair
from jcrosslora.lineage.method_selection import why_not_run
from jcrosslora.session.settings import TransferOptions
from jcrosslora.utils.memory import enough_memory
from jcrosslora.utils.progress import begin

if TYPE_CHECKING:
    from jcrosslora.evaluate.effect import Effect

EFFECT = "measure the effect"  # the step of a transfer


def measure_effect(
    pair: BasePair,
    original: Adapter,
    moved: Adapter,
    options: TransferOptions,
    *,
    runs_bases: bool,
    probes: Sequence[str],
    completions: Sequence[str],
    progress: bool,
) -> tuple[Effect | None, tuple[str, ...]]:
    """Measure the effect where it is wanted.

    Args:
        pair: both bases.
        original: the adapter of the source, with fused matrices taken apart.
        moved: the adapter of the target.
        options: of the transfer.
        runs_bases: whether the method runs both bases anyway.
        probes: texts that both bases were run on.
        completions: texts that the source wrote with its adapter. An adapter that was trained on answers hardly shows in
            text of another kind, so these come first.
        progress: whether to show progress.

    Returns:
        The effect, or None where it is not wanted or cannot be measured, and warnings.

    Raises:
        UsageError: the effect is wanted "always", and there is no text to measure it on.
        CheckpointError: it is wanted "always", and a base cannot be run.
    """
    if options.effect == "never" or (options.effect == "auto" and not runs_bases):
        return None, ()
    begin(EFFECT)
    try:
        with enough_memory("leave out the check with --effect never"):
            found = _measured(pair, original, moved, options, runs_bases, probes, completions, progress)
    # A transfer that is finished is not lost for a figure that was not asked for.
    except (UsageError, ShortMemoryError) as error:
        if options.effect == "always":
            raise
        found, warnings = None, (f"the effect was not measured: {error}",)
    else:
        warnings = ()
    return found, warnings


def _measured(
    pair: BasePair,
    original: Adapter,
    moved: Adapter,
    options: TransferOptions,
    runs_bases: bool,
    probes: Sequence[str],
    completions: Sequence[str],
    progress: bool,
) -> Effect | None:
    # A method that runs the bases has shown by now that they can be run.
    if not runs_bases and (obstacle := why_not_run(pair.source, pair.target)) is not None:
        msg = f"the effect cannot be measured: {obstacle}; leave out --effect always"
        raise CheckpointError(msg)
    from jcrosslora.evaluate.effect_check import adapter_texts, check_effect

    adapters = original, moved
    if completions:
        return check_effect(pair.source, pair.target, *adapters, (), written=completions, progress=progress)
    written = adapter_texts(pair.source, original, seed=options.seed, progress=progress)
    if not probes and not written:
        return None
    return check_effect(pair.source, pair.target, *adapters, probes, written=written, progress=progress)
