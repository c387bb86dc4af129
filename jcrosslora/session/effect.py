"""The check at the end of a transfer: the effect of the moved adapter next to that of the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import CheckpointError, ShortMemoryError, UsageError
from jcrosslora.methods import Task
from jcrosslora.relation.method_selection import why_not_run
from jcrosslora.session.conclusion import Request
from jcrosslora.utils.cost import enough_memory
from jcrosslora.utils.progress import begin

if TYPE_CHECKING:
    from jcrosslora.decoder import LoadedBases
    from jcrosslora.evaluate.effect import Effect

EFFECT = "measure the effect"  # the step of a transfer, as it names itself on the display


def measure_effect(
    task: Task, moved: Adapter, request: Request, texts: Sequence[str], written: Sequence[str]
) -> tuple[Effect | None, tuple[str, ...]]:
    """Measure the effect if the options ask for it.

    Args:
        task: both bases, with the original adapter; it loads one base at a time where it has no loaded bases.
        moved: the adapter of the target.
        request: the method and the options.
        texts: that both bases were run on.
        written: texts that the source wrote with its adapter. An adapter trained on answers hardly shows in text of
            another kind, so these come first.

    Returns:
        The effect, or None if it is not requested or cannot be measured, and warnings.

    Raises:
        UsageError: the effect is requested "always", and there is no text to measure it on.
        CheckpointError: it is requested "always", and a base cannot be run.
    """
    options, runs_bases = request.options, request.method.runs_bases
    source, target, original, loaded = task.base, task.target, task.adapter, task.loaded
    if not options.checks_effect(runs_bases=runs_bases):
        return None, ()
    begin(EFFECT)
    # A method that runs the bases has already shown that they can be run.
    if not runs_bases and (obstacle := why_not_run(source, target)) is not None:
        msg = f"the effect cannot be measured: {obstacle}; leave out --effect always"
        raise CheckpointError(msg)
    from jcrosslora.evaluate.effect import check_effect

    texts = () if written else texts
    try:
        with enough_memory("leave out the check with --effect never"):
            written = written or _texts(source, original, options.seed, loaded)
            if not texts and not written:
                return None, ()
            found = check_effect((source, original), (target, moved), texts, written=written, loaded=loaded)
    # A finished transfer is not given up for a check that was not requested.
    except (UsageError, ShortMemoryError) as error:
        if options.effect == "always":
            raise
        return None, (f"the effect was not measured: {error}",)
    return found, ()


def _texts(source: BaseModel, original: Adapter, seed: int, loaded: LoadedBases | None) -> Sequence[str]:
    """Let the source write with its adapter; its weights are dropped afterwards unless `loaded` keeps them."""
    from jcrosslora.decoder import fast_dtype
    from jcrosslora.evaluate.effect import adapter_texts

    model = None if loaded is None else loaded.model(source, fast_dtype())
    return adapter_texts(source, original, seed=seed, model=model)
