"""The steps of a distillation around its gradient steps: write and split completions, make the teacher."""

import dataclasses
import logging
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel, Tokenizer, load_tokenizer
from jcrosslora.decoder import Generator, Model, StackedAdapter
from jcrosslora.distill.batches import DistillationBatch, make_batches
from jcrosslora.distill.completions import Completions, answer_given, write_completions
from jcrosslora.distill.endings import Endings, complete_part
from jcrosslora.distill.fit import EvalPoint, Fit
from jcrosslora.distill.judge import Judge, answers_in_columns, batch_answers
from jcrosslora.distill.output_columns import EosTokens, OutputColumns, find_columns
from jcrosslora.distill.settings import ROUND, DistillSettings, FitSchedule
from jcrosslora.distill.sources import Source, Writer
from jcrosslora.distill.sources.decoder import DecoderSource, RestrictedModel, digest_values
from jcrosslora.distill.states import FitStates, kept_states
from jcrosslora.distill.task_search import choose_writer
from jcrosslora.distill.teacher import Teacher
from jcrosslora.distill.templates import Sampler
from jcrosslora.text import Completion, Prompt
from jcrosslora.text.reading import ending
from jcrosslora.utils.digests import digest_of, sha256

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Data:
    """The first completions, with labelled examples, as the fit reads them.

    Attributes:
        judged: batches of the held-out completions, which decide which update is kept.
        answers: the source's greedy answers to the held-out prompts.
        held_out: these prompts.
    """

    fitted: list[DistillationBatch]
    judged: list[DistillationBatch]
    answers: list[DistillationBatch]
    held_out: Collection[Prompt]


@dataclass(frozen=True, eq=False)
class Distillation:
    """The steps before and between the gradient steps, and the objects they share.

    Attributes:
        model: the target with its weights.
        prompts: of the user, to be answered by the source.
        examples: labelled examples, whose answers are taught.
        clock: `time.monotonic()` at the beginning.
    """

    source: Source
    target: BaseModel
    model: Model
    settings: DistillSettings
    prompts: Sequence[Prompt]
    examples: Sequence[Completion]
    seed: int
    clock: float

    @property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """The tokenizers of source and target."""
        return self.source.tokenizer, load_tokenizer(self.target)

    @property
    def prompted(self) -> bool:
        """Whether the completions answer prompts of a user."""
        return bool(self.prompts or self.examples)

    @property
    def course(self) -> FitSchedule:
        """The settings that depend on whether there are prompts."""
        return self.settings.course(prompted=self.prompted)

    def write_completions(self, shared: dict[Any, Any] | None) -> Completions:
        """Write the completions that come before the first step."""
        writer, course, settings = self._writer(shared), self.course, self.settings
        sampler = Sampler(course.first, settings.answer_tokens, course.temperature, self.seed, course.end)
        if not self.prompted:
            return write_completions(self.source, writer, sampler, settings.discovery)
        labelled = [one.prompt for one in self.examples]
        return answer_given(self.source, writer, self.prompts, sampler, labelled=labelled, shared=shared)

    def _writer(self, shared: dict[Any, Any] | None) -> Writer:
        """Choose who writes prompts: the base that does it better, or the source if none are needed."""
        if self.settings.budget is None and len(self.prompts) >= sum(self.course.rounds):
            return self.source.alone()
        target = DecoderSource.of(self.target, model=self.model, tokenizer=self.tokenizers[1])
        return choose_writer(self.source, target, shared)

    def teach_ends_if_needed(self, completions: Completions) -> tuple[Completions, tuple[str, ...]]:
        """Teach where answers end if too many run on; also return the warnings to show."""
        endings = Endings.of(completions.items) if self._ends(completions).symbol[1] else Endings()
        if endings.unreliable and self.course.end == "auto":
            completions = completions.with_taught_ends(self.source)
        warnings = endings.warnings(self.course.end)
        for text in warnings:
            _LOG.warning(text)
        return completions, warnings

    def _ends(self, completions: Completions) -> EosTokens:
        return end_tokens(self.tokenizers, self._items(completions))

    def _items(self, completions: Completions) -> list[Completion]:
        return [*completions.items, *self.examples]

    def chats(self, completions: Completions) -> bool:
        """Whether some of the prompts are conversations."""
        return any(not isinstance(item.prompt, str) for item in self._items(completions))

    def split(self, completions: Completions) -> Data:
        """Split the completions into training and held-out ones, as batches."""
        fitted, judging = hold_out(self._items(completions), self.settings, self.seed, prompted=self.prompted)
        fitted += (self.course.repeats - 1) * [item for item in fitted if item.taught == "answer"]
        held_out = dict.fromkeys(item.prompt for item in judging)
        said = [item for item in judging if item.greedy and item.taught != "answer"]
        answered = {item.prompt for item in said}
        said += completions.greedy([prompt for prompt in held_out if prompt not in answered])
        answers = batch_answers([complete_part(item) for item in said], self.tokenizers)
        return Data(self.batches(fitted), self.batches(judging), answers, held_out)

    def batches(self, items: Sequence[Completion]) -> list[DistillationBatch]:
        """Make batches with the weights of the settings."""
        settings = self.settings
        return make_batches(
            items,
            tokenizers=self.tokenizers,
            prompt_weight=settings.prompt_weight,
            text_weight=settings.text_weight,
            example_weight=settings.example_weight,
            ends=self.course.end != "never",
        )

    def choose_columns(self, data: Data, completions: Completions) -> OutputColumns:
        """Find the tokens on which predictions are compared."""
        read = [*data.fitted, *data.judged, *data.answers]
        ends, rounded = self._ends(completions), isinstance(self.source, DecoderSource)
        return find_columns(self.source, self.target, read, self.settings.compared_tokens, ends, rounded=rounded)

    def make_fit(
        self, data: Data, columns: OutputColumns, completions: Completions, start: StackedAdapter | None
    ) -> Fit:
        """Make the teacher, and the fit with its first evaluation."""
        reader = self.source.reader(columns.head_rows(0), len(columns.ends[0]))
        target = RestrictedModel.of(self.model, columns.head_rows(1), len(columns.ends[1]))
        confidence = 1.0 if completions.task is None else completions.task.explained
        teacher = Teacher(reader, target, columns, self.settings.teacher_weights(confidence))
        answers = [answers_in_columns(batch, columns) for batch in data.answers]
        judge = Judge([teacher.read(batch) for batch in data.judged], answers)
        return Fit(teacher, judge, self.settings, start, prompted=self.prompted, begun=self.clock, seed=self.seed)

    def write_round(
        self, completions: Completions, held_out: Collection[Prompt], number: int, own: StackedAdapter | None
    ) -> list[DistillationBatch]:
        """Write the batches of a further round; with an update `own` of the target, the target writes them."""
        student = Generator(self.model.with_adapter(own), self.tokenizers[1], self.target.ref, "the fitted update")
        items = completions.more(number, held_out, self.source if own is None else student)
        items += examples_of_round(self.examples, number, self.course.first // self.course.repeats, held_out)
        return self.batches(items) if items else []

    def open_states(self, parent: Path | None, start: Adapter | None) -> AbstractContextManager[FitStates | None]:
        """Open the folder for the fit's states, named by its inputs; None without `parent` or further rounds."""
        if parent is None or not (self.settings.budget or self.course.rounds[1:]):
            return nullcontext()
        digests = [self.source.identity(), self.target.digest(), None if start is None else digest_values(start)]
        digests += [(one.chat_template, sha256(one.backend.to_str().encode())) for one in self.tokenizers]
        settings, form = dataclasses.asdict(self.settings), tuple(EvalPoint.__annotations__)  # a state holds points
        return kept_states(parent, {"fit": digest_of(*digests, self.prompts, self.examples, settings, self.seed, form)})


def as_taught(examples: Sequence[Completion]) -> list[Completion]:
    """Turn examples into completions whose answers, ends included, are taught as they are."""
    return [dataclasses.replace(one, taught="answer") for one in examples]


def without_labelled(prompts: Sequence[Prompt], examples: Sequence[Completion]) -> list[Prompt]:
    """Drop duplicates, and prompts with a labelled answer, which the source need not answer."""
    labelled = {one.prompt for one in examples}
    return [one for one in dict.fromkeys(prompts) if one not in labelled]


def examples_of_round(
    examples: Sequence[Completion], number: int, first: int, excluded: Collection[Prompt] = ()
) -> list[Completion]:
    """Take the examples that a further round repeats, in turn; `number` counts rounds from 1.

    Each appears once per `first` completions, so that a long fit does not forget them.
    """
    usable = [one for one in examples if one.prompt not in excluded]
    count = -(-len(usable) * ROUND // first)
    return [usable[place % len(usable)] for place in range((number - 1) * count, number * count)]


def hold_out(
    completions: Sequence[Completion], settings: DistillSettings, seed: int, *, prompted: bool
) -> tuple[list[Completion], list[Completion]]:
    """Split completions into training and held-out ones; all answers to one prompt are on the same side.

    The completions answer at least two prompts. If the source answered any, one of its answers stays in training.
    """
    prompts = list(dict.fromkeys(item.prompt for item in completions))
    order = [prompts[index] for index in np.random.default_rng(seed).permutation(len(prompts))]
    count = settings.held_of(len(prompts), prompted=prompted)
    held_out, answered = set(order[:count]), {item.prompt for item in completions if item.taught != "answer"}
    if answered and answered <= held_out:  # the fit needs an answer of the source
        held_out ^= {next(one for one in order if one in answered), order[count]}
    rest = [item for item in completions if item.prompt not in held_out]
    return rest, [item for item in completions if item.prompt in held_out]


def end_tokens(tokenizers: tuple[Tokenizer, Tokenizer], completions: Sequence[Completion]) -> EosTokens:
    """Find the tokens that end a text: all of the source's, and those of the target's that should end its answers.

    If either side has none, the end cannot be compared, and the symbol is empty on both sides.
    """
    stops = tokenizers[0].stops, tokenizers[1].stops
    chats = {not isinstance(item.prompt, str) for item in completions}
    found = {ending(tokenizers[1], chat=chat) for chat in chats}
    if None in found or not stops[0]:
        return EosTokens(stops)
    return EosTokens(stops, (stops[0], tuple(sorted(end for end in found if end is not None))))
