"""Tasks and rows of the lift table: the questions for training, for hyper-parameters and for tests; the methods."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from written_task import written_example

import jcrosslora as jcl
from jcrosslora.evaluate import Question, read_task
from jcrosslora.methods import make_method
from jcrosslora.session.settings import OWN_FIELDS, read_table, setting_types

Split = Literal["test", "train-rest"]
REST = 300  # train questions that no adapter is trained on, if there are enough


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: of the task, used in names of folders.
        train: questions of the train file.
        test: questions of the test file.
        first: how many of `train` are trained on; the rest is for hyper-parameters and for prompts.
        written: whether the answer is written instead of chosen; then accuracy is exact match.
    """

    name: str
    train: Sequence[Question]
    test: Sequence[Question]
    first: int
    written: bool = False

    @property
    def examples(self) -> Sequence[Question]:
        """The questions that adapters are trained on."""
        return self.train[: self.first]

    def questions(self, split: Split, prompts: int) -> Sequence[Question]:
        """Choose the questions to score: of the train file only those that are neither trained on nor used as prompts.

        Raises:
            UsageError: no question of the train file is left.
        """
        if split == "test":
            return self.test
        rest = self.train[self.first + prompts :]
        if not rest:
            used = f"{self.first} examples and {prompts} prompts use up its {len(self.train)} train questions"
            raise jcl.UsageError(f"{self.name}: {used}: lower --first or --prompts")
        return rest

    def prompts(self, count: int) -> list[str]:
        """Take prompts without answers from questions that no adapter was trained on.

        Raises:
            UsageError: there are too few.
        """
        rest = self.train[self.first : self.first + count]
        if len(rest) < count:
            msg = (
                f"{self.name}: has {len(rest)} train questions behind the first {self.first}, {count} prompts expected"
            )
            raise jcl.UsageError(msg)
        return [question.prompt for question in rest]


@dataclass(frozen=True)
class Row:
    """One way to move an adapter, a row of the table.

    Attributes:
        name: as printed, and in the names of folders.
        settings: flat settings as recipes have them, the method among them.
        prompts: unlabelled train questions to give as probe text; 0 for none.
        text: a file of other texts to give as probe text.
    """

    name: str
    settings: dict[str, Any]
    prompts: int = 0
    text: Path | None = None

    @property
    def slug(self) -> str:
        """The name as a file name, with a digest of other texts, so that a changed file is another row."""
        if self.text is None:
            return slug(self.name)
        return f"{slug(self.name)}-{hashlib.sha256(self.text.read_bytes()).hexdigest()[:8]}"


def slug(text: str) -> str:
    """Make a file name of a text: runs of characters other than letters, digits and . = _ + - become one -."""
    return re.sub(r"[^A-Za-z0-9.=_+-]+", "-", text).strip("-")


def load_task(train: Path, test: Path, first: int, written: bool) -> Task:
    """Read a task; its name is that of its train file without "_train".

    300 questions of the train file, or a quarter of a short one, are never trained on: they are for choosing settings
    and for prompts. The table's title says how many were trained on.

    Raises:
        UsageError: a file cannot be read, or `first` is below 1.
    """
    if first < 1:
        raise jcl.UsageError(f"first {first} is out of range; it must be at least 1")
    name, questions = train.stem.removesuffix("_train"), [read_task(train), read_task(test)]
    if written:
        name = f"{name}_written"
        questions = [[written_example(one) for one in each] for each in questions]
    count = len(questions[0])
    return Task(name, *questions, first=min(first, max(1, count * 3 // 4, count - REST)), written=written)


_OUTSIDE_LISTS = re.compile(r",(?![^\[]*\])")  # commas between settings, not those of a list


def parse_row(text: str, prompts: int = 0, file: Path | None = None) -> Row:
    """A row from METHOD or METHOD:KEY=VALUE,KEY=VALUE with keys as recipes have them.

    Args:
        text: the method with its settings.
        prompts: number of unlabelled train questions for its probe text.
        file: other probe text, where there are no prompts.

    Raises:
        MethodError: an unknown method.
        UsageError: a key that is no setting, or none of the method's, or that the table sets itself, or one without a
            value or with one of another type than the setting has.
    """
    method, _, rest = text.partition(":")
    make_method(method)
    settings: dict[str, Any] = {"method": method}
    for part in filter(None, _OUTSIDE_LISTS.split(rest)):
        key, _, value = part.partition("=")
        settings[key] = _value(key, value, f"--method {text}")
    make_method(method, {key: value for key, value in settings.items() if key not in OWN_FIELDS})
    probed = f", {prompts} prompts" if prompts else f", on {file.stem}" if file else ""
    return Row(text + probed, settings, prompts, file)


def _value(key: str, value: str, place: str) -> Any:
    """Parse a number, true, false or null as JSON; anything else is text."""
    own = ("adapter", "source", "target", "out", "method", "seed", "prompts", "overwrite")
    types = {name: kind for name, kind in setting_types().items() if name not in own}
    if key not in types or not value:
        raise jcl.UsageError(f"{place}: expected KEY=VALUE behind the colon, with keys of {', '.join(sorted(types))}")
    try:
        found = json.loads(value)
    except ValueError:
        found = value
    return found if found is None else read_table({key: found}, types, place)[key]
