"""From two bases and an adapter of one to an update of the other: completions, distillation_batches, steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.truncation import truncate_to_rounding
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import fast_dtype, load_params, settings_of, stack_adapter, unstack_adapter
from jcrosslora.errors import CheckpointError, UsageError
from jcrosslora.evidence.probes.start_words import check_seed
from jcrosslora.fit.distill.batches import DistillationBatch, distillation_batches, shared_tokens
from jcrosslora.fit.distill.completions import Completion, Writer
from jcrosslora.fit.distill.fit import Fitted, Teacher, fit
from jcrosslora.fit.distill.reader import reader
from jcrosslora.fit.distill.settings import FitSettings
from jcrosslora.fit.distill.writing import FEWEST, Written, continue_prompts, write_completions
from jcrosslora.utils.progress import track


@dataclass(frozen=True, eq=False)
class Distilled:
    """An update of the target.

    Attributes:
        adapter: what it started from and the steps, scale 1.
        divergences: KL(teacher || target with the update) on completions held out, nats a position: before the first step
            and after each.
        positions: predictions that the steps were fitted on.
        sentence: what was done, for reports, without a full stop.
        texts: the completions, prompts and answers.
    """

    adapter: Adapter
    divergences: tuple[float, ...]
    positions: int
    sentence: str
    texts: tuple[str, ...]


def distill(
    source: BaseModel,
    target: BaseModel,
    adapter: Adapter,
    start: Adapter | None = None,
    *,
    prompts: Sequence[str] = (),
    settings: FitSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Distilled:
    """Fit an update of the target to what an adapter changes in the source's predictions.

    The teacher of the fit is a mean of the log-probabilities of the target and of the adapted source, and on top of it
    a share of what the adapter changes in them (`fit.distill.reader.teach`): at positions where tokens of both
    end at the same character, on the tokens that both have. The text is what the source writes with the adapter:
    answers to prompts, given ones or its own. Each step minimises a quadratic model of the divergence from the teacher
    in closed form (see `fit.distill.solve`), and is made as long as is best on completions that no step is fitted
    on.

    Memory: one base's weights, in `jcrosslora.decoder.fast_dtype()`, while texts are written, then the layers of both,
    of each fitted module its gradient and two square moments, and at most 4 GB that the target's layers keep for the
    backward passes; where it would be more they are computed again. Time: for the default settings that of about 350
    forward passes of 8 short texts, beside writing them.

    Args:
        source: the base that `adapter` is of.
        target: the base to update.
        adapter: of the source, with fused matrices taken apart (see `fit_to_base`).
        start: an update of the target to start from; None starts from nothing.
        prompts: text that answers are to follow; without any the source writes prompts itself.
        settings: how the fit is done.
        seed: of all that is sampled.
        progress: whether to show progress bars.

    Raises:
        UsageError: settings or a seed out of range, or texts without a position that matches.
        MethodError: too few answers, answers to one prompt alone, or too few tokens that both bases have.
        AdapterError: an adapter does not fit its base, or the source's predictions with its own are not finite.
        CheckpointError: a base or its tokenizer cannot be read, or the target's predictions are not finite.
    """
    settings = FitSettings() if settings is None else settings
    _check(settings)
    check_seed(seed)
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    dtype = fast_dtype()
    stacked = stack_adapter(adapter, source)
    begun = None if start is None else stack_adapter(start, target)
    params = load_params(source, dtype)
    writer = Writer(
        settings_of(source), params, tokenizers[0], stacked, name=source.ref, adapter_name=adapter.info.name
    )
    written = _write(writer, prompts, settings, seed, progress)
    taught, held_out = _distillation_batches(written.completions, tokenizers, settings, seed)
    everything = [batch_of_completions for part in (*taught, held_out) for batch_of_completions in part]
    ids = shared_tokens(source, target, everything, settings.vocabulary)
    src = reader(settings_of(source), params, _tokens(everything, 0), ids[0])
    del writer, params
    tgt = reader(settings_of(target), load_params(target, dtype), _tokens(everything, 1), ids[1])
    teacher = Teacher(src, tgt, stacked, settings.teacher_weight, settings.contrast_weight)
    found = fit(teacher, taught, held_out, settings, begun, seed=seed, progress=progress)
    _check_finite(found, target)
    positions = sum(int((batch_of_completions.weight > 0).sum()) for part in taught for batch_of_completions in part)
    return Distilled(
        truncate_to_rounding(unstack_adapter(found.adapter)),
        found.divergences,
        positions,
        _sentence(found, written, positions, len(ids[0])),
        tuple(completion.text for completion in written.completions),
    )


def _check(settings: FitSettings) -> None:
    least = {"steps": 1, "rank": 1, "completions": FEWEST, "tokens": 1, "vocabulary": 1}
    for name, fewest in least.items():
        if getattr(settings, name) < fewest:
            msg = f"a fit with {name} {getattr(settings, name)} was asked for, wanted {fewest} or more"
            raise UsageError(msg)
    if not 0 < settings.held_out < 1:
        msg = f"a fit with held_out {settings.held_out} was asked for, wanted a share between 0 and 1"
        raise UsageError(msg)
    if not 0 <= settings.teacher_weight <= 1:
        msg = f"a fit with teacher_weight {settings.teacher_weight} was asked for, wanted a share from 0 to 1"
        raise UsageError(msg)
    if not np.isfinite(settings.contrast_weight):
        msg = (
            f"a fit with contrast_weight {settings.contrast_weight} was asked for, wanted a finite number, such as 0.25"
        )
        raise UsageError(msg)


def _write(writer: Writer, prompts: Sequence[str], settings: FitSettings, seed: int, progress: bool) -> Written:
    with track(1, "write completions", show=progress) as bar:
        found = (
            continue_prompts(writer, prompts, settings, seed) if prompts else write_completions(writer, settings, seed)
        )
        bar.update()
    return found


def _distillation_batches(
    completions: Sequence[Completion], tokenizers: tuple[Tokenizer, Tokenizer], settings: FitSettings, seed: int
) -> tuple[list[list[DistillationBatch]], list[DistillationBatch]]:
    """The distillation_batches of every step, and those held out; answers to one prompt are all on one side."""
    prompts = list(dict.fromkeys(completion.prompt for completion in completions))
    order = np.random.default_rng(seed).permutation(len(prompts))
    count = max(1, round(settings.held_out * len(prompts)))
    place = {prompts[index]: rank for rank, index in enumerate(order)}
    held_out = [item for item in completions if place[item.prompt] < count]
    rest = sorted((item for item in completions if place[item.prompt] >= count), key=lambda item: place[item.prompt])
    steps = min(settings.steps, len(rest))
    parts = [rest[step::steps] for step in range(steps)]
    return [distillation_batches(part, tokenizers, settings.prompt_weight) for part in parts], distillation_batches(
        held_out, tokenizers, settings.prompt_weight
    )


def _tokens(found: Sequence[DistillationBatch], side: int) -> np.ndarray:
    return np.concatenate([(item.batch.tokens_src, item.batch.tokens_tgt)[side].ravel() for item in found])


def _check_finite(found: Fitted, target: BaseModel) -> None:
    """The source's predictions with the adapter were finite while it wrote: what is not comes from the target."""
    finite = all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(found.adapter))
    if not finite or not np.isfinite(found.divergences).all():
        what = "its weights, or what the fit began with, are too large or not numbers"
        msg = f"{target.ref}: gives predictions that are not finite: {what}"
        raise CheckpointError(msg)


def _sentence(found: Fitted, written: Written, positions: int, tokens: int) -> str:
    first, last = found.divergences[0], found.divergences[-1]
    fitted = f"fitted in {len(found.divergences) - 1} steps to {positions:,} predictions over {tokens:,} shared tokens"
    held = f"on completions held out the divergence from what was wanted went from {first:.3g} to {last:.3g} nats"
    return f"{fitted}, in {written.description}; {held}"
