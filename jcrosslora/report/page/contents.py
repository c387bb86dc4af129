"""The contents of a page: a transfer, an evaluation, the roles of adapters, and the update in each layer."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Literal, TypeAlias

import msgspec

from jcrosslora.checkpoint.hub import public_name
from jcrosslora.errors import UsageError, suggestion
from jcrosslora.evaluate import Answers, Interval, Scores, answers_json, scores_json
from jcrosslora.evaluate.bootstrap import Direction, word_of
from jcrosslora.report.record import REPORT, TransferReport, read_bytes, read_report
from jcrosslora.text import COMPLETIONS
from jcrosslora.utils.picking import from_start

_SHOWN = 10
_ADVICE = "give the output of `jcrosslora evaluate --json`"
Part: TypeAlias = Literal["base", "moved", "trained", "random", "other"]
# Bounded, so that a damaged number is refused and not drawn.
_Number = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**9)]


class Figure(msgspec.Struct, frozen=True):
    """A figure of one model: 95% interval, difference to the base, and share of a trained adapter's gain (`lift`)."""

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
    """The output of `jcrosslora evaluate --json`, with `questions` of choices or `examples` answered in writing."""

    models: list[dict[str, str | Figure]]
    not_scored: list[str]
    trained: str | None = None
    digest: str | None = None  # of the base
    questions: _Count = 0
    examples: _Count = 0
    answers: list[Example] = []


@dataclass(frozen=True)
class Roles:
    """Names of adapters in the evaluation; None if not given."""

    moved: str | None = None  # the adapter that the page is about
    trained: str | None = None  # on the target
    random: str | None = None  # moved by method `random`


@dataclass(frozen=True)
class Model:
    """A model that was evaluated."""

    name: str  # as the page shows it, without a folder
    part: Part  # "other" for an adapter until `Evaluation.with_parts` assigns its part
    figures: Mapping[str, Figure]  # by their names, such as "exact" or "accuracy"
    count: int  # of questions or examples

    @property
    def title(self) -> str:
        """Return a title for a newcomer."""
        return {"base": "without adapter", "other": self.name}.get(self.part, f"{self.part} adapter")

    def direction(self, figure: str) -> Direction | None:
        """Return whether a figure is better or worse than the base's; None if unknown."""
        found = self.figures.get(figure)
        return None if found is None or found.minus_base is None else word_of(figure, found.minus_base, self.count)


@dataclass(frozen=True)
class Evaluation:
    """The figures and answers of a base, which comes first, and of its adapters."""

    models: tuple[Model, ...]
    count: int  # of questions or examples
    written: bool  # whether the answers are texts, not choices
    not_scored: tuple[str, ...]  # what the figures leave out, one sentence each
    examples: tuple[Example, ...]  # some examples, with the answers of all models in their order
    trained: str | None = None  # the adapter whose gain `Figure.lift` is a share of
    digest: str | None = None  # of the base
    guessed: bool = False  # whether the moved adapter has another name, and was taken as the only one left

    def of_part(self, part: Part) -> Model | None:
        """Return the model that plays a part; None if there is none."""
        return next((model for model in self.models if model.part == part), None)

    def with_parts(self, roles: Roles, own: str) -> "Evaluation":
        """Assign parts to adapters; raise UsageError if a name is unknown or ambiguous, or one adapter gets two parts.

        `own` is the name of the moved adapter if `roles` gives none. If no adapter has this name and only one is left,
        that is the moved one.
        """
        names = [model.name for model in self.models[1:]]
        parts: dict[str, Part] = {}
        stated: dict[Part, str | None] = {"moved": roles.moved, "trained": roles.trained, "random": roles.random}
        for part, said in stated.items():
            if said is None:
                continue
            if said not in names:
                _check_unique(said, names, part)
            name = _called(said, names)
            if name is None or name in parts:
                came = f"is the {parts[name]} adapter already" if name else "is not among those evaluated"
                known = f"expected one of {', '.join(names) or 'none: only the base was evaluated'}"
                raise UsageError(f"{part} adapter {said!r} {came}{suggestion(said, names)}: {known}")
            parts[name] = part
        if "trained" not in parts.values() and self.trained in names and self.trained not in parts:
            parts[self.trained] = "trained"
        left = [name for name in names if name not in parts]
        if roles.moved is None:
            _check_unique(own, left, "moved")
        found, guessed = _called(own, left), False
        if roles.moved is None and found is None and len(left) == 1:
            found, guessed = left[0], True
        if roles.moved is None and found is not None:
            parts[found] = "moved"
        models = [dataclasses.replace(one, part=parts.get(one.name, "other")) for one in self.models[1:]]
        if parts.get(self.trained or "") != "trained":  # the shares refer to another adapter's gain
            plain = [{name: msgspec.structs.replace(f, lift=None) for name, f in one.figures.items()} for one in models]
            models = [dataclasses.replace(one, figures=figures) for one, figures in zip(models, plain, strict=True)]
        return dataclasses.replace(self, models=(self.models[0], *models), guessed=guessed)


@dataclass(frozen=True)
class Contents:
    """The contents of a page, without the parts that are None or empty."""

    name: str  # of the folder; "moved" for a result in memory, as in its recipe
    moved: TransferReport | None
    evaluation: Evaluation | None
    texts: tuple[str, ...] = ()  # some texts of the fit, if the source wrote their prompts too


def find_contents(folder: Path, answers: Path | None = None, roles: Roles = Roles()) -> Contents:
    """Read the files of a transfer and of an evaluation from a folder.

    Args:
        folder: one that `jcrosslora transfer` wrote, or one with the output of `jcrosslora evaluate --json`, or both.
        answers: the output of `jcrosslora evaluate --json`; None takes the one in the folder, if there is one.

    Raises:
        UsageError: there is nothing to show, a file cannot be read or is damaged, or a role names no evaluated adapter.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: is no folder: give one that `jcrosslora transfer` wrote")
    report = folder / REPORT
    moved = read_report(report) if report.exists() else None
    path = answers or _only_evaluation(folder)
    evaluation = None if path is None else parse_evaluation(read_bytes(path), str(path))
    if moved is None and evaluation is None:
        msg = f"{folder}: holds neither {REPORT} nor the output of `jcrosslora evaluate --json` in a .json file: "
        msg += "give a folder that `jcrosslora transfer` wrote"
        raise UsageError(msg)
    name = folder.resolve().name
    if evaluation is not None:
        evaluation = evaluation.with_parts(roles, name)
    elif roles != Roles():
        raise UsageError(f"{folder}: no adapter was evaluated, so none has a role: give --answers as well")
    return Contents(name, moved, evaluation, _texts(folder / COMPLETIONS) if moved is not None else ())


def contents_of(report: TransferReport, answers: Answers | Scores | None, roles: Roles, own: str) -> Contents:
    """Return the contents for a transfer, as `documents.published` returned it, and an evaluation of the target.

    `own` is the name of the moved adapter, if it was evaluated. Raises UsageError if a role names no adapter.
    """
    evaluation = None
    if answers is not None:
        # `with_parts` refuses unknown names.
        shown = {public_name(name) or name: name for name in answers.names[1:]}
        trained = shown.get(_called(roles.trained or "", list(shown)) or "")
        written = isinstance(answers, Answers)
        data = answers_json(answers, show=_SHOWN, trained=trained) if written else scores_json(answers, trained=trained)
        evaluation = parse_evaluation(json.dumps(data).encode(), "the answers").with_parts(roles, own)
    return Contents("moved", report, evaluation)


def parse_evaluation(content: bytes, place: str) -> Evaluation:
    """Read the output of `jcrosslora evaluate --json`, or raise UsageError; `place` names the file in errors."""
    try:
        found = msgspec.json.decode(content, type=_Output)
        count = found.questions or found.examples
        models = tuple(_model(place, entry, count) for place, entry in enumerate(found.models))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{place}: is no evaluation, or a damaged one ({error}): {_ADVICE}") from error
    names = [model.name for model in models]
    if not models or not count > 0 or len(set(names)) < len(names):
        msg = f"{place}: has {count} examples and the models {', '.join(names) or 'none'}, "
        msg += f"expected 1 or more of both and names that differ: {_ADVICE}"
        raise UsageError(msg)
    if any(len(one.written) != len(models) for one in found.answers):
        raise UsageError(f"{place}: is damaged (an example without the answers of all {len(models)} models): {_ADVICE}")
    return Evaluation(
        models,
        count,
        not found.questions,
        tuple(found.not_scored),
        tuple(found.answers),
        found.trained and (public_name(found.trained) or found.trained),
        found.digest,
    )


def _called(said: str, names: Sequence[str]) -> str | None:
    """Return a name if it is among `names`, else the only one with the same last path part; None if there is none."""
    alike = [name for name in names if PurePath(name).name == PurePath(said).name]
    return said if said in names else alike[0] if len(alike) == 1 else None


def _check_unique(said: str, names: Sequence[str], part: Part) -> None:
    """Raise UsageError if several adapters have this last path part: `evaluate` adds numbers from " (2)" on."""
    name = PurePath(said).name
    if name in names and (second := f"{name} (2)") in names:
        msg = f"several evaluated adapters are called {name!r}: say which is the {part} one, {name!r} or {second!r}"
        raise UsageError(msg)


def _model(place: int, entry: Mapping[str, str | Figure], count: int) -> Model:
    name = entry.get("name")
    if not isinstance(name, str):
        raise msgspec.ValidationError("a model has no name")
    figures = {key: value for key, value in entry.items() if isinstance(value, Figure)}
    return Model(public_name(name) or name, "other" if place else "base", figures, count)


def _only_evaluation(folder: Path) -> Path | None:
    """Return the evaluation in a folder; None if there is none. Raise UsageError if there are several."""
    found = [path for path in sorted(folder.glob("*.json")) if path.is_file() and _is_evaluation(path)]
    if len(found) > 1:
        msg = f"{folder}: holds several evaluations, {', '.join(path.name for path in found)}: name one by --answers"
        raise UsageError(msg)
    return found[0] if found else None


def _is_evaluation(path: Path) -> bool:
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"models", "not_scored"} <= found.keys()


def _texts(path: Path) -> tuple[str, ...]:
    """Return up to ten texts of a fit, evenly spread; raise UsageError if they cannot be read."""
    if not path.exists():
        return ()
    lines = [line for line in read_bytes(path).split(b"\n") if line.strip()]
    return tuple(_text(lines[at], f"{path}:{at + 1}") for at in from_start(range(len(lines)), _SHOWN))


def _text(line: bytes, place: str) -> str:
    try:
        entry = json.loads(line)
        if "messages" in entry:
            return "\n".join(message["content"] for message in entry["messages"])
        return "".join((entry["prompt"], entry["completion"]))
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        msg = f'{place}: is damaged, expected {{"messages"}} or {{"prompt", "completion"}}: move the adapter again'
        raise UsageError(msg) from error
