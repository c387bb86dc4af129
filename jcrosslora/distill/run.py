"""Run a distillation: open the source, write completions, fit, and describe the result."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from msgspec import structs

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.truncation import truncate_to_rounding
from jcrosslora.checkpoint import BaseModel, load_tokenizer, roles_named
from jcrosslora.decoder import LoadedBases, fast_dtype, stack_adapter, unstack_adapter
from jcrosslora.distill.distillation import Distillation, as_taught, without_labelled
from jcrosslora.distill.facts import FitFacts
from jcrosslora.distill.fit import EvalPoint, Fitted
from jcrosslora.distill.own_prompts import OwnPrompts, find_own_prompts
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.distill.sources import Source
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.errors import CheckpointError, MethodError
from jcrosslora.evaluate.probes import check_seed
from jcrosslora.text import Completion, Prompt
from jcrosslora.text.reading import template_of, tokenizer_of


@dataclass(frozen=True, eq=False)
class Distilled:
    """A fitted update of the target.

    Attributes:
        adapter: the sum of the starting and the fitted update, scale 1.
        curve: evaluations on held-out completions, before the first step and during the fit.
        facts: what it was fitted to, how far the fit went, and what it reproduces.
        completions: the ones written before the fit.
        warnings: findings about the adapter, one sentence each.
        chat_template: the target's, with which conversations were rendered; None if there were none.
    """

    adapter: Adapter
    curve: tuple[EvalPoint, ...]
    facts: FitFacts
    completions: tuple[Completion, ...]
    warnings: tuple[str, ...] = ()
    chat_template: str | None = None


def distill(
    source: BaseModel | Source,
    target: BaseModel,
    adapter: Adapter | None = None,
    start: Adapter | None = None,
    *,
    prompts: Sequence[Prompt] = (),
    examples: Sequence[Completion] = (),
    settings: DistillSettings = DistillSettings(),  # noqa: B008
    seed: int = 0,
    states: Path | None = None,
    loaded: LoadedBases | None = None,
    shared: dict[Any, Any] | None = None,
) -> Distilled:
    """Train an update of the target to predict what the source predicts with its adapter.

    The teacher is a mean of the log-probabilities of the target and of the adapted source, plus a share of the change
    that the adapter makes (`jcrosslora.distill.teacher.mix_teacher`). Predictions are compared where tokens of both
    bases end at the same character, over the shared tokens and the end of the text. The source with its adapter writes
    the text: answers to given prompts, to those that it learnt (`find_own_prompts`), or to others. Gradient steps train
    the factors of all modules (`jcrosslora.distill.fit`).

    Memory: the weights of the target, and of a source that our decoder runs, in `jcrosslora.decoder.fast_dtype()`; the
    factors; and at most 4 GB of activations of the target, beyond which they are recomputed. Time: writing the texts,
    and for each batch of 4 texts two forward passes of the source and two of the target with one gradient.

    Args:
        source: the adapter's base, which our decoder runs; or a source that can only be queried, with its adapter.
        adapter: the source's adapter, with fused matrices split (see `fit_to_base`); unused for a queried source.
        start: an update of the target to start from; None starts from zero.
        prompts: texts or conversations to answer; without prompts and examples the source writes prompts itself.
        examples: prompts with right answers, which are taught in addition. The source answers other prompts: the given
            ones, or else prompts similar to those of the examples.
        seed: seeds all sampling.
        states: folder for the states of long fits, those with further rounds; a stopped fit continues from there.
        loaded: gives the weights of both bases; None loads them for this fit.
        shared: results that hold for all adapters of the pair; new ones are added.

    Raises:
        UsageError: settings or a seed out of range, or texts without a position that matches.
        MethodError: too few answers, answers to one prompt alone, too few tokens that both bases have, or no update
            that is better than none.
        AdapterError: an adapter does not fit its base, or the source's predictions with it are not finite.
        CheckpointError: a base or its tokenizer cannot be read, or the target's predictions are not finite.
        SourceError: a source behind a server does not answer, or not as it should.
    """
    settings.check()
    check_seed(seed)
    roles_named(settings.roles, target.architecture.role_shapes)  # refused before text is written
    prompts, examples = without_labelled(prompts, examples), as_taught(examples)
    loaded = loaded or LoadedBases()
    source = _open_source(source, target, adapter, loaded)
    clock, own = time.monotonic(), None
    if settings.own_prompt_count and not (prompts or examples):
        own = find_own_prompts(source, settings.own_prompt_count, seed)
        prompts = [] if own is None else own.prompts
    usual = replace(settings, completions=None).for_prompts(len(prompts), len(examples)).completions or 0
    settings = settings.for_prompts(len(prompts), len(examples))
    stacked_start = None if start is None else stack_adapter(start, target)
    model = loaded.model(target, fast_dtype())
    work = Distillation(source, target, model, settings, prompts, examples, seed, clock)
    completions, warnings = work.teach_ends_if_needed(work.write_completions(shared))
    data = work.split(completions)
    columns = work.choose_columns(data, completions)
    fit = work.make_fit(data, columns, completions, stacked_start)
    with work.open_states(states, start) as kept:
        fitted = fit.run(data.fitted, partial(work.write_round, completions, data.held_out), kept)
    _check_finite(fitted, target)
    update = truncate_to_rounding(unstack_adapter(fitted.adapter, target))
    _check_found(update, fitted)
    facts = structs.replace(
        completions.facts if own is None else _of_own(completions.facts, own),
        planned=settings.completions or 0,
        usual=usual,
        examples=len(examples),
        predictions=sum(batch.positions for batch in data.fitted),
        tokens=len(columns.shared[0]),
        on_top=start is not None,
        devices=1 if loaded.mesh is None else loaded.mesh.size,
    )
    return Distilled(
        update,
        fitted.curve,
        _with_course(facts, fitted),
        tuple(completions.items),
        warnings,
        template_of(work.tokenizers[1]) if work.chats(completions) else None,
    )


def _of_own(facts: FitFacts, own: OwnPrompts) -> FitFacts:
    """Record that the adapter wrote the prompts that the facts count as given."""
    return structs.replace(facts, given=0, answered=0, own=facts.answered, opening=own.opening, gain=own.gain)


def _open_source(source: BaseModel | Source, target: BaseModel, adapter: Adapter | None, loaded: LoadedBases) -> Source:
    """Return the source with its adapter; a base is loaded, to be run by our decoder."""
    if not isinstance(source, BaseModel):
        return source
    assert adapter is not None
    tokenizer = tokenizer_of(source, adapter.info.chat_template)
    load_tokenizer(target)  # refused before weights are read
    return DecoderSource.of(source, adapter, model=loaded.model(source, fast_dtype()), tokenizer=tokenizer)


def _check_finite(fitted: Fitted, target: BaseModel) -> None:
    """Raise CheckpointError for the target if a fit is not finite: the source's predictions were checked before."""
    finite = all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(fitted.adapter))
    if not finite or not np.isfinite([point.divergence for point in fitted.curve]).all():
        what = "its weights, or the update that the fit started from, are too large or not numbers"
        raise CheckpointError(f"{target.ref}: gives predictions that are not finite: {what}")


def _check_found(update: Adapter, fitted: Fitted) -> None:
    """Raise MethodError if the fit found nothing better than no update at all."""
    if not jax.tree.leaves(update):
        count = f"{len(fitted.curve) - 1} evaluations on held-out completions"
        msg = f"the fit found no update that is better than none ({count}): give more prompts, --completions or "
        raise MethodError(msg + "--passes, and see what the adapter does on its own base (`jcrosslora generate`)")


def _with_course(facts: FitFacts, fitted: Fitted) -> FitFacts:
    """Add how far a fit went, and what the update that was kept reproduces."""
    first, best = fitted.curve[0], min(fitted.curve, key=lambda point: point.divergence)
    return structs.replace(
        facts,
        later=fitted.new_completions,
        later_target=fitted.own,
        steps=fitted.steps,
        done=fitted.done,
        held_out=best.held_out,
        agreed_before=first.agreed,
        agreed=best.agreed,
        divergence_before=first.divergence,
        divergence=best.divergence,
    )
