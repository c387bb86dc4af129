"""Distillation as a whole: write completions, make batches, fit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.truncation import truncate_to_rounding
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import (
    Generator,
    StackedAdapter,
    fast_dtype,
    load_params,
    settings_of,
    stack_adapter,
    unstack_adapter,
)
from jcrosslora.errors import CheckpointError
from jcrosslora.evidence.probes.writing import check_seed
from jcrosslora.fit.distill.batches import DistillationBatch, make_batches, used_tokens
from jcrosslora.fit.distill.completions import Completions, answer_given, write_completions
from jcrosslora.fit.distill.fit import Fitted, fit
from jcrosslora.fit.distill.refit import ROUND, Refitted, refit
from jcrosslora.fit.distill.settings import DistillSettings
from jcrosslora.fit.distill.symbols import find_symbols
from jcrosslora.fit.distill.teacher import ReducedBase, Teacher
from jcrosslora.text import Completion, Prompt
from jcrosslora.text.chat_template import template_of
from jcrosslora.text.reading import ending


@dataclass(frozen=True, eq=False)
class Distilled:
    """A fitted update of the target.

    Attributes:
        adapter: the update that the fit started from and the steps, scale 1.
        divergences: KL(teacher || target with the update) on held-out completions, nats a position: before the first
            step and after each.
        positions: predictions that the steps were fitted on.
        sentence: a summary for reports, without a full stop.
        texts: the completions, prompts and answers.
        chat_template: of the target, in which it read conversations; None if there were none.
    """

    adapter: Adapter
    divergences: tuple[float, ...]
    positions: int
    sentence: str
    texts: tuple[str, ...]
    chat_template: str | None = None


def distill(
    source: BaseModel,
    target: BaseModel,
    adapter: Adapter,
    start: Adapter | None = None,
    *,
    prompts: Sequence[Prompt] = (),
    settings: DistillSettings = DistillSettings(),  # noqa: B008
    seed: int = 0,
    progress: bool = False,
) -> Distilled:
    """Fit an update of the target to what an adapter changes in the source's predictions.

    The teacher is a mean of the log-probabilities of the target and of the adapted source, plus a share of the change
    that the adapter makes in them (`jcrosslora.fit.distill.teacher.mix_teacher`). They are compared at positions where
    tokens of both bases end at the same character, on the tokens that both have and on the end of the text. The text is
    written by the source with the adapter: answers to given prompts, or to its own. Each step minimises a quadratic
    model of the divergence from the teacher in closed form (`jcrosslora.fit.distill.step`); its length is the best on
    held-out completions. Gradient steps in all modules follow if the settings ask for them
    (`jcrosslora.fit.distill.refit`).

    Memory: one base's weights, in `jcrosslora.decoder.fast_dtype()`, while texts are written; then the layers of both,
    a gradient and two square moments for each fitted module, and at most 4 GB of activations of the target, which are
    recomputed where they would take more. Time: writing the texts, and with the default settings about 350 forward
    passes of 8 short texts.

    Args:
        source: the base that `adapter` is of.
        target: the base to update.
        adapter: of the source, with fused matrices split (see `fit_to_base`).
        start: an update of the target to start from; None starts from nothing.
        prompts: texts or conversations that answers are to follow; without any the source writes prompts itself.
        settings: of the fit.
        seed: of all that is sampled.
        progress: whether to show progress bars.

    Raises:
        UsageError: settings or a seed out of range, or texts without a position that matches.
        MethodError: too few answers, answers to one prompt alone, or too few tokens that both bases have.
        AdapterError: an adapter does not fit its base, or the source's predictions with its own are not finite.
        CheckpointError: a base or its tokenizer cannot be read, or the target's predictions are not finite.
    """
    settings.check()
    check_seed(seed)
    clock = time.monotonic()
    tokenizers = _own_template(load_tokenizer(source), adapter), load_tokenizer(target)
    stacked = stack_adapter(adapter, source)
    begun = None if start is None else stack_adapter(start, target)
    generator = Generator.of(source, adapter, params=load_params(source, fast_dtype()), tokenizer=tokenizers[0])
    if prompts:
        completions = answer_given(generator, prompts, settings, seed, progress=progress)
    else:
        completions = write_completions(generator, settings, seed, progress=progress)
    parts, held_out, kept_back = _make_parts(completions.items, tokenizers, settings, seed)
    batches = [batch for part in (*parts, held_out) for batch in part]
    stops, ends = (tokenizers[0].stops, tokenizers[1].stops), end_tokens(tokenizers, completions.items)
    symbols = find_symbols(source, target, batches, settings.compared_tokens, stops, ends)
    # What is written anew may hold any token.
    used = (None, None) if settings.refits else (used_tokens(batches, 0), used_tokens(batches, 1))
    src = ReducedBase.of(generator.settings, generator.params, used[0], symbols.heads(0), len(ends[0]))
    writer = generator if settings.refits else None
    del generator
    params = load_params(target, fast_dtype())
    tgt = ReducedBase.of(settings_of(target), params, used[1], symbols.heads(1), len(ends[1]))
    teacher = Teacher(src, tgt, stacked, settings, symbols)
    judged = [teacher.read(batch) for batch in held_out]
    fitted = fit(teacher, parts, judged, settings, begun, seed=seed, progress=progress)
    refitted = None
    if writer is not None:

        def fresh(number: int, own: StackedAdapter | None) -> list[DistillationBatch]:
            student = Generator(tgt.settings, params, tokenizers[1], own, target.ref, "the fitted update")
            answerer = writer if own is None else student
            items = completions.more(writer, ROUND, seed + 100 + number, kept_back, answerer)
            return make_batches(items, tokenizers, settings.prompt_weight) if items else []

        refitted = refit(teacher, fitted, judged, fresh, settings, clock, seed=seed, progress=progress)
        fitted = Fitted(refitted.adapter, fitted.divergences)
    _check_finite(fitted, target)
    positions = sum(batch.positions for part in parts for batch in part)
    return Distilled(
        truncate_to_rounding(unstack_adapter(fitted.adapter)),
        fitted.divergences,
        positions,
        _sentence(fitted, completions, positions, len(symbols.shared[0])) + _refit_sentence(refitted),
        tuple(item.text for item in completions.items),
        template_of(tokenizers[1]) if any(not isinstance(item.prompt, str) for item in completions.items) else None,
    )


def _make_parts(
    completions: Sequence[Completion], tokenizers: tuple[Tokenizer, Tokenizer], settings: DistillSettings, seed: int
) -> tuple[list[list[DistillationBatch]], list[DistillationBatch], set[Prompt]]:
    """Make the batches of each step, and those held out, with their prompts; answers to one are all on one side."""
    prompts = list(dict.fromkeys(item.prompt for item in completions))
    order = np.random.default_rng(seed).permutation(len(prompts))
    # At least one prompt on each side.
    count = min(max(1, round(settings.held_out * len(prompts))), len(prompts) - 1)
    place = {prompts[index]: rank for rank, index in enumerate(order)}
    held_out = [item for item in completions if place[item.prompt] < count]
    rest = sorted((item for item in completions if place[item.prompt] >= count), key=lambda item: place[item.prompt])
    steps = min(settings.step_count, len(rest))
    parts = [make_batches(rest[step::steps], tokenizers, settings.prompt_weight) for step in range(steps)]
    return parts, make_batches(held_out, tokenizers, settings.prompt_weight), {item.prompt for item in held_out}


def _own_template(tokenizer: Tokenizer, adapter: Adapter) -> Tokenizer:
    """Read conversations in the template that lies beside the adapter, if there is one."""
    template = adapter.info.chat_template
    return tokenizer if template is None else dataclasses.replace(tokenizer, chat_template=template)


def end_tokens(
    tokenizers: tuple[Tokenizer, Tokenizer], completions: Sequence[Completion]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the tokens that end a text: any of the source's; of the target's those that are to end its answers.

    Returns:
        Their ids; none on both sides if one side has none, as the end then cannot be compared.
    """
    chats = {not isinstance(item.prompt, str) for item in completions}
    found = {ending(tokenizers[1], chat=chat) for chat in chats}
    if None in found or not tokenizers[0].stops:
        return (), ()
    return tokenizers[0].stops, tuple(sorted(end for end in found if end is not None))


def _check_finite(fitted: Fitted, target: BaseModel) -> None:
    """Blame the target: the source's predictions with the adapter were finite while it wrote."""
    finite = all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(fitted.adapter))
    if not finite or not np.isfinite(fitted.divergences).all():
        what = "its weights, or the update that the fit started from, are too large or not numbers"
        msg = f"{target.ref}: gives predictions that are not finite: {what}"
        raise CheckpointError(msg)


def _refit_sentence(refitted: Refitted | None) -> str:
    if refitted is None:
        return ""
    first, best = refitted.divergences[0], min(refitted.divergences)
    ending = ", where it was stopped" if refitted.stopped else ""
    where = f"then in gradient steps in all modules on {refitted.completions:,} completions written anew{ending}"
    return f"; {where}, to {best:.3g} nats" if best < first else f"; {where}, without gain"


def _sentence(fitted: Fitted, completions: Completions, positions: int, tokens: int) -> str:
    first, last = fitted.divergences[0], fitted.divergences[-1]
    steps = f"fitted in {len(fitted.divergences) - 1} steps to {positions:,} predictions over {tokens:,} shared tokens"
    held = f"on held-out completions the divergence from the teacher went from {first:.3g} to {last:.3g} nats"
    return f"{steps}, in {completions.description}; {held}"
