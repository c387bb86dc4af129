"""Distillation as a whole: write completions, make batches, fit."""

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.truncation import truncate_to_rounding
from jcrosslora.checkpoint import BaseModel, Tokenizer, load_tokenizer
from jcrosslora.decoder import Generator, LoadedBases, StackedAdapter, fast_dtype, stack_adapter, unstack_adapter
from jcrosslora.distill.agreement import answers_in_symbols, batch_answers
from jcrosslora.distill.batches import DistillationBatch, make_batches
from jcrosslora.distill.completions import Completions, answer_given, write_completions
from jcrosslora.distill.endings import Endings
from jcrosslora.distill.fit import Fit, Fitted, Look
from jcrosslora.distill.labelled import as_taught, examples_of_round, without_labelled
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.distill.sources import Source, Writer
from jcrosslora.distill.sources.decoder import DecoderSource, RestrictedModel, digest_values
from jcrosslora.distill.symbols import Ends, find_symbols
from jcrosslora.distill.task_search import choose_writer
from jcrosslora.distill.teacher import Teacher
from jcrosslora.distill.templates import Sampler
from jcrosslora.errors import CheckpointError
from jcrosslora.evaluate.probes import check_seed
from jcrosslora.text import Completion, Prompt
from jcrosslora.text.reading import ending, template_of, with_own_template
from jcrosslora.training.checkpoints import Checkpoints
from jcrosslora.utils.digests import digest_of
from jcrosslora.utils.unfinished import remove_unchanged

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Distilled:
    """A fitted update of the target.

    Attributes:
        adapter: the update that the fit started from and the fitted one, scale 1.
        looks: at held-out completions, before the first step and as the fit went.
        sentence: a summary for reports, without a full stop.
        completions: that were written before the fit.
        warnings: what was found out about the adapter, one sentence each.
        chat_template: of the target, in which it read conversations; None if there were none.
    """

    adapter: Adapter
    looks: tuple[Look, ...]
    sentence: str
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
    """Fit an update of the target to what an adapter changes in the predictions of a source.

    The teacher is a mean of the log-probabilities of the target and of the adapted source, plus a share of the change
    that the adapter makes in them (`jcrosslora.distill.teacher.mix_teacher`). They are compared at positions where
    tokens of both bases end at the same character, on the tokens that both have and on the end of the text. The text is
    written by the source with the adapter: answers to given prompts, or to its own. Factors of all modules are fitted
    by gradient steps (`jcrosslora.distill.fit`).

    Memory: the weights of the target, and of a source that our decoder runs, in `jcrosslora.decoder.fast_dtype()`; the
    factors; and at most 4 GB of activations of the target, which are recomputed where they would take more. Time:
    writing the texts, and for each batch of 4 texts two forward passes of the source and two of the target with one
    gradient.

    Args:
        source: the base that `adapter` is of, which our decoder runs; or a source that can only be queried, with its
            adapter.
        adapter: of a source that our decoder runs, with fused matrices split (see `fit_to_base`); else not used.
        start: an update of the target to start from; None starts from nothing.
        prompts: texts or conversations that answers are to follow; without any, and without examples, the source writes
            prompts itself.
        examples: prompts with right answers, which are taught on top of those that the source answers; it answers other
            prompts, like theirs where none are given.
        seed: of all that is sampled.
        states: folder for the states of fits that go on beyond their first completions; a stopped one continues there.
        loaded: gives the weights of both bases; None loads them for this fit.
        shared: what holds for all adapters of the pair; new findings are added.

    Raises:
        UsageError: settings or a seed out of range, or texts without a position that matches.
        MethodError: too few answers, answers to one prompt alone, or too few tokens that both bases have.
        AdapterError: an adapter does not fit its base, or the source's predictions with its own are not finite.
        CheckpointError: a base or its tokenizer cannot be read, or the target's predictions are not finite.
        SourceError: a source behind a server does not answer, or not as it should.
    """
    settings.check()
    check_seed(seed)
    prompts, taught = without_labelled(prompts, examples), as_taught(examples)
    settings = settings.for_prompts(len(prompts), len(taught))
    loaded = loaded or LoadedBases()
    if isinstance(source, BaseModel):
        assert adapter is not None
        tokenizer = with_own_template(load_tokenizer(source), adapter.info.chat_template)
        load_tokenizer(target)  # refused before weights are read
        source = DecoderSource.of(source, adapter, model=loaded.model(source, fast_dtype()), tokenizer=tokenizer)
    clock = time.monotonic()
    tokenizers = source.tokenizer, load_tokenizer(target)
    begun = None if start is None else stack_adapter(start, target)
    model = loaded.model(target, fast_dtype())
    writer: Writer = source.alone()
    if settings.budget is not None or len(set(prompts)) < settings.completions:  # else no prompt is written
        writer = choose_writer(source, DecoderSource.of(target, model=model, tokenizer=tokenizers[1]), shared)
    prompted = bool(prompts or taught)
    course = settings.course(prompted=prompted)
    sampler = Sampler(settings.rounds[0], settings.answer_tokens, course.temperature, seed, course.end)
    if prompted:
        labelled = [one.prompt for one in taught]
        completions = answer_given(source, writer, prompts, sampler, labelled=labelled, shared=shared)
    else:
        completions = write_completions(source, writer, sampler, settings.discovery)
    ends = end_tokens(tokenizers, [*completions.items, *taught])
    endings = Endings.of(completions.items) if ends.symbol[1] else Endings()
    if endings.unreliable and course.end == "auto":
        completions = completions.with_ends()
    warnings = endings.warnings(course.end)
    for text in warnings:
        _LOG.warning(text)
    batched = partial(
        make_batches,
        tokenizers=tokenizers,
        prompt_weight=settings.prompt_weight,
        text_weight=settings.text_weight,
        example_weight=settings.example_weight,
        ends=course.end != "never",
    )
    items = [*completions.items, *taught]
    fitted_to, held_out = hold_out(items, settings.held_out, seed)
    batches, judged = map(batched, (fitted_to, held_out))
    kept_back, said = dict.fromkeys(item.prompt for item in held_out), held_out
    if course.temperature > 0:
        said = completions.greedy(kept_back)
    answers = batch_answers(said, tokenizers)
    rounded, read = isinstance(source, DecoderSource), [*batches, *judged, *answers]
    symbols = find_symbols(source, target, read, settings.compared_tokens, ends, rounded=rounded)
    reader = source.reader(symbols.heads(0), len(symbols.ends[0]))
    tgt = RestrictedModel.of(model, symbols.heads(1), len(symbols.ends[1]))

    def fresh(number: int, own: StackedAdapter | None) -> list[DistillationBatch]:
        student = Generator(model.with_adapter(own), tokenizers[1], target.ref, "the fitted update")
        items = completions.more(number, kept_back, source if own is None else student)
        items += examples_of_round(taught, number, kept_back)
        return batched(items) if items else []

    known = 1.0 if completions.task is None else completions.task.explained
    teacher = Teacher(reader, tgt, symbols, settings.teacher_weights(known), settings.token_share)
    lessons = [teacher.read(batch) for batch in judged]
    kept = nullcontext()
    if states is not None and settings.grows:
        digests = [source.identity(), target.digest(), None if start is None else digest_values(start)]
        kept = kept_states(states, {"fit": digest_of(*digests, prompts, taught, dataclasses.asdict(settings), seed)})
    with kept as checkpoints:
        wanted = [answers_in_symbols(batch, symbols) for batch in answers]
        fit = Fit(teacher, lessons, settings, begun, answers=wanted, prompted=prompted, begun=clock, seed=seed)
        fitted = fit.run(batches, fresh, checkpoints)
    _check_finite(fitted, target)
    positions = sum(batch.positions for batch in batches)
    chats = any(not isinstance(item.prompt, str) for item in items)
    devices = 1 if loaded.mesh is None else loaded.mesh.size
    return Distilled(
        truncate_to_rounding(unstack_adapter(fitted.adapter, target)),
        fitted.looks,
        _sentence(fitted, completions, len(taught), positions, len(symbols.shared[0]), devices),
        tuple(completions.items),
        warnings,
        template_of(tokenizers[1]) if chats else None,
    )


def hold_out(completions: Sequence[Completion], share: float, seed: int) -> tuple[list[Completion], list[Completion]]:
    """Divide completions into those to fit to and those held out; answers to one prompt are all on one side."""
    prompts = list(dict.fromkeys(item.prompt for item in completions))
    order = np.random.default_rng(seed).permutation(len(prompts))
    # At least one prompt on each side.
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    held_out = {prompts[index] for index in order[:count]}
    rest = [item for item in completions if item.prompt not in held_out]
    return rest, [item for item in completions if item.prompt in held_out]


def end_tokens(tokenizers: tuple[Tokenizer, Tokenizer], completions: Sequence[Completion]) -> Ends:
    """Find the tokens that end a text: any of the source's; of the target's those that are to end its answers.

    The symbol has none on both sides if one side has none, as the end then cannot be compared.
    """
    stops = tokenizers[0].stops, tokenizers[1].stops
    chats = {not isinstance(item.prompt, str) for item in completions}
    found = {ending(tokenizers[1], chat=chat) for chat in chats}
    if None in found or not stops[0]:
        return Ends(stops)
    return Ends(stops, (stops[0], tuple(sorted(end for end in found if end is not None))))


def _check_finite(fitted: Fitted, target: BaseModel) -> None:
    """Raise CheckpointError for the target if a fit is not finite: the source's predictions were while it wrote."""
    finite = all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(fitted.adapter))
    if not finite or not np.isfinite([look.divergence for look in fitted.looks]).all():
        what = "its weights, or the update that the fit started from, are too large or not numbers"
        msg = f"{target.ref}: gives predictions that are not finite: {what}"
        raise CheckpointError(msg)


def _sentence(
    fitted: Fitted, completions: Completions, examples: int, positions: int, tokens: int, devices: int
) -> str:
    first, best = fitted.looks[0], min(fitted.looks, key=lambda look: look.divergence)
    steps = f"fitted to {positions:,} predictions over {tokens:,} shared tokens"
    anew = max(look.completions for look in fitted.looks) - len(completions.items) - examples
    right = f", and in {examples:,} labelled examples" if examples else ""
    further = f", then to {anew:,} more completions" if anew > 0 else ""
    own = f", of which the target wrote {fitted.own:,}" if fitted.own else ""
    ending = "; it was stopped before its end" if fitted.stopped else ""
    ending += f"; the weights were divided over {devices} devices" if devices > 1 else ""
    went = f"went from {first.divergence:.3g} to {best.divergence:.3g} nats"
    held = f"on held-out completions the divergence from the teacher {went}"
    if not math.isnan(best.agreement):
        held += f", and the share of the source's greedy answers that the target writes from {first.agreement:.0%} to "
        held += f"{best.agreement:.0%}"
    return f"{steps}, in {completions.description}{right}{further}{own}; {held}{ending}"


@contextmanager
def kept_states(parent: Path, run: Mapping[str, Any]) -> Iterator[Checkpoints]:
    """Open the folder of a fit, named by what the fit depends on; remove it when the block ends without an exception.

    Folders that did not change for 30 days are removed as well. Errors are those of `Checkpoints`.
    """
    folder = parent / digest_of(run)[:24]
    remove_unchanged(parent, folder)
    with closing(Checkpoints(folder, run)) as found:
        yield found
    shutil.rmtree(folder, ignore_errors=True)
