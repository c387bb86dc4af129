"""What the page takes from the output of `jcrosslora evaluate --json`, checked, and which model plays which part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal, TypeAlias

import msgspec

from jcrosslora.checkpoint.hub import public_name
from jcrosslora.errors import UsageError, suggestion
from jcrosslora.evaluate.bootstrap import Interval
from jcrosslora.evaluate.score import Direction, word_of

Part: TypeAlias = Literal["base", "moved", "trained", "random", "other"]

# A damaged number must not become a picture that cannot be drawn.
_Number = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
_ADVICE = "give the output of `jcrosslora evaluate --json`"


class Figure(msgspec.Struct, frozen=True):
    """A figure of one model with its 95% interval, its difference to the base, its share of a trained one's gain."""

    value: _Number
    low: _Number
    high: _Number
    minus_base: Interval | None = None
    lift: Interval | None = None


class Written(msgspec.Struct, frozen=True):
    """What a model wrote."""

    name: str
    text: str
    ended: bool
    exact: bool


class Example(msgspec.Struct, frozen=True):
    """A prompt, the right answers, and what each model wrote."""

    prompt: str
    right: list[str]
    written: list[Written]


class _Output(msgspec.Struct, frozen=True):
    """The output of the command; of questions with choices `questions`, of answers in writing `examples`."""

    models: list[dict[str, str | Figure]]
    not_scored: list[str]
    trained: str | None = None
    questions: _Count = 0
    examples: _Count = 0
    answers: list[Example] = []


@dataclass(frozen=True)
class Roles:
    """Names of adapters among those evaluated; None where it is not said."""

    moved: str | None = None  # the adapter that the page is about
    trained: str | None = None  # on the target
    random: str | None = None  # moved by method `random`


@dataclass(frozen=True)
class Model:
    """A model that was evaluated.

    Attributes:
        name: as the page shows it, without a folder.
        part: what it stands for; of an adapter "other" until `Evaluation.with_parts` has said so.
        figures: by their names, such as "exact" or "accuracy".
    """

    name: str
    part: Part
    figures: Mapping[str, Figure]

    @property
    def title(self) -> str:
        """Name the model for a newcomer."""
        return {"base": "without adapter", "other": self.name}.get(self.part, f"{self.part} adapter")

    def without_lift(self) -> Model:
        """Return the model without shares of a gain, which are of another adapter than the page is about."""
        figures = {name: msgspec.structs.replace(one, lift=None) for name, one in self.figures.items()}
        return dataclasses.replace(self, figures=figures)

    def direction(self, figure: str) -> Direction | None:
        """Say whether a figure is better or worse than the base's; None where that is not known."""
        found = self.figures.get(figure)
        return None if found is None or found.minus_base is None else word_of(figure, found.minus_base)


@dataclass(frozen=True)
class Evaluation:
    """The figures and answers of a base, which is first, and its adapters.

    Attributes:
        count: how many questions or examples there were.
        written: whether they were answered in writing.
        not_scored: what the figures leave out, one sentence each.
        examples: some of the examples with the answers of all models, in their order.
        trained: name of the adapter whose gain the shares in the figures are of; None if there are none.
        guessed: whether the moved adapter is taken to be the one that is left, by whatever name.
    """

    models: tuple[Model, ...]
    count: int
    written: bool
    not_scored: tuple[str, ...]
    examples: tuple[Example, ...]
    trained: str | None = None
    guessed: bool = False

    def of_part(self, part: Part) -> Model | None:
        """Return the model that plays a part; None where there is none."""
        return next((model for model in self.models if model.part == part), None)

    def with_parts(self, roles: Roles, own: str) -> Evaluation:
        """Say which adapter is which.

        Args:
            roles: as they were named.
            own: what the moved adapter is called if no name of it was given. If there is none of this name either, one
                that is alone without a part is the moved one.

        Raises:
            UsageError: there is no such adapter, or one has two parts.
        """
        names = [model.name for model in self.models[1:]]
        parts: dict[str, Part] = {}
        named: tuple[Part, ...] = ("moved", "trained", "random")
        for part in named:
            said = getattr(roles, part)
            if said is None:
                continue
            name = called(said, names)
            if name is None or name in parts:
                came = f"is the {parts[name]} adapter already" if name else "is not among those evaluated"
                known = f"wanted one of {', '.join(names) or 'none: only the base was evaluated'}"
                msg = f"{part} adapter {said!r} {came}{suggestion(said, names)}: {known}"
                raise UsageError(msg)
            parts[name] = part
        if "trained" not in parts.values() and self.trained in names and self.trained not in parts:
            parts[self.trained] = "trained"
        left = [name for name in names if name not in parts]
        found, guessed = called(own, left), False
        if roles.moved is None and found is None and len(left) == 1:
            found, guessed = left[0], True
        if roles.moved is None and found is not None:
            parts[found] = "moved"
        models = [dataclasses.replace(one, part=parts.get(one.name, "other")) for one in self.models[1:]]
        if parts.get(self.trained or "") != "trained":
            models = [one.without_lift() for one in models]
        return dataclasses.replace(self, models=(self.models[0], *models), guessed=guessed)


def called(said: str, names: Sequence[str]) -> str | None:
    """Find the name that was said among names, or the only one with the same last part; None if there is none."""
    alike = [name for name in names if PurePath(name).name == PurePath(said).name]
    return said if said in names else alike[0] if len(alike) == 1 else None


def parse_evaluation(content: bytes, place: str) -> Evaluation:
    """Read the output of `jcrosslora evaluate --json`; `place` names the file in errors.

    Raises:
        UsageError: it is damaged, or something else.
    """
    try:
        found = msgspec.json.decode(content, type=_Output)
        models = tuple(_model(place, entry) for place, entry in enumerate(found.models))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        msg = f"{place}: is no evaluation, or a damaged one ({error}): {_ADVICE}"
        raise UsageError(msg) from error
    names = [model.name for model in models]
    if not models or not max(found.questions, found.examples) > 0 or len(set(names)) < len(names):
        msg = f"{place}: has {found.questions or found.examples} examples and the models {', '.join(names) or 'none'}, "
        msg += f"wanted 1 or more of both and names that differ: {_ADVICE}"
        raise UsageError(msg)
    if any(len(one.written) != len(models) for one in found.answers):
        msg = f"{place}: is damaged (an example without the answers of all {len(models)} models): {_ADVICE}"
        raise UsageError(msg)
    count, trained = found.questions or found.examples, found.trained and (public_name(found.trained) or found.trained)
    written = not found.questions
    return Evaluation(models, count, written, tuple(found.not_scored), tuple(found.answers), trained)


def _model(place: int, entry: Mapping[str, str | Figure]) -> Model:
    name = entry.get("name")
    if not isinstance(name, str):
        msg = "a model has no name"
        raise msgspec.ValidationError(msg)
    figures = {key: value for key, value in entry.items() if isinstance(value, Figure)}
    return Model(public_name(name) or name, "other" if place else "base", figures)
