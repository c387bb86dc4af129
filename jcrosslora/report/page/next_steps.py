"""The next steps with a moved adapter: sentences, each with commands for this transfer."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.checkpoint.orbax import find_checkpoint
from jcrosslora.distill.settings import ENOUGH
from jcrosslora.evaluate.bootstrap import FEWEST
from jcrosslora.report.fit import remedies
from jcrosslora.report.page.contents import Contents, Evaluation
from jcrosslora.report.page.headline import headline
from jcrosslora.report.recipe import RECIPE
from jcrosslora.report.record import USELESS, TransferReport
from jcrosslora.report.usage import PROMPT, peft_lines, quoted
from jcrosslora.utils.texts import visible

_TASK = """`task.jsonl`, one a line, as `{"prompt": "...", "answer": "..."}`"""


@dataclass(frozen=True)
class Step:
    """A sentence, with code in backticks, and the lines to paste into a shell."""

    sentence: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class _Names:
    """The adapter's folder and its base, as the commands name them."""

    folder: str
    base: str

    @classmethod
    def of(cls, contents: Contents) -> "_Names":
        evaluation, moved = contents.evaluation, contents.moved
        if moved is not None:
            return cls(contents.name, moved.target.ref or moved.target.name or "TARGET")
        assert evaluation is not None  # a page shows a transfer, an evaluation or both
        base, *adapters = (model.name for model in evaluation.models)
        return cls(adapters[0] if adapters else "moved", base)

    def evaluate(self, more: str = "") -> str:
        beside = f"--adapter {quoted(self.folder)}{more} --show 10 --json > answers.json"
        return f"jcrosslora evaluate --base {quoted(self.base)} --data task.jsonl {beside}"

    @property
    def recipe(self) -> str:
        return str(Path(self.folder) / RECIPE)

    def report(self, more: str = "") -> str:
        return f"jcrosslora report {quoted(self.folder)} --answers answers.json{more}"

    def generate(self) -> str:
        return f"jcrosslora generate {quoted(PROMPT)} --base {quoted(self.base)} --adapter {quoted(self.folder)}"

    def transfer(self, moved: TransferReport, out: str) -> str:
        source = moved.source.ref or moved.source.name or "SOURCE"
        ends = f"--source {quoted(source)} --target {quoted(self.base)}"
        return f"jcrosslora transfer {quoted(moved.adapter.name or 'ADAPTER')} {ends} --out {out}"


def next_steps(contents: Contents) -> Iterator[Step]:
    """Yield the next steps that apply, the most useful first."""
    names, evaluation, moved = _Names.of(contents), contents.evaluation, contents.moved
    bad = headline(contents).tone == "bad"
    if moved is None:
        said = "To show how the adapter was made, name the folder that `jcrosslora transfer` wrote."
        yield Step(said, (names.report(),))
    elif bad:
        yield from _another_way(names, moved)
    if evaluation is not None:
        yield from _naming(names, evaluation)
    if not _tells_enough(evaluation):
        said = (
            "Find out whether the adapter works: write a hundred questions of its task or more with right answers to "
        )
        yield Step(f"{said}{_TASK}.", (names.evaluate(), names.report()))
    if not bad:
        said = "Use the adapter: try a prompt of its task."
        yield Step(said, (names.generate(),))
    if evaluation is not None and len(evaluation.models) > 1:
        yield from _comparisons(names, evaluation, moved)


def _tells_enough(evaluation: Evaluation | None) -> bool:
    """Return whether an evaluation compares adapters on enough questions, with examples if answers were written."""
    if evaluation is None or len(evaluation.models) == 1 or evaluation.count < FEWEST:
        return False
    return bool(evaluation.examples) or not evaluation.written


def first_steps(moved: TransferReport, out: str, target: str, profile: str) -> Iterator[str]:
    """Yield the lines that end a transfer: how to load the folder `out`, evaluate it, and see it on a page.

    If the verdict expects no effect or harm, they say what would help instead.

    Args:
        moved: as `documents.published` returned it.
        target: the base as the user named it, with paths of this machine.
    """
    names = _Names(out, target)
    if moved.verdict.level in USELESS:
        for step in _another_way(names, moved):
            yield step.sentence
            yield from (f"  {command}" for command in step.commands)
        return
    python = f"python -c {quoted('; '.join(peft_lines(*map(os.path.expanduser, (target, out)))))}"
    trained = Path(target).expanduser()
    if trained.is_dir() and find_checkpoint(trained) is not None:  # a tunix checkpoint, which peft cannot load
        yield "write it for tunix:"
        ends = f"--base {quoted(target)} --profile tunix --out {quoted(f'{out}-tunix')}"
        yield f"  jcrosslora export {quoted(out)} {ends}"
        yield from _judging(names)
        return
    in_peft = profile in ("portable", "peft")
    if in_peft and not is_hub_id(moved.target.name or ""):
        said = f"note: the adapter names {moved.target.name or 'nothing'} as its base, which is no hub id, so peft's "
        yield said + "AutoPeftModel will not find it: give --target-id OWNER/NAME, or load the base first"
    yield "load it with peft (pip install 'jcrosslora[torch]'):" if in_peft else "use it:"
    yield f"  {python if in_peft else names.generate()}"
    yield from _judging(names)


def _judging(names: _Names) -> Iterator[str]:
    yield f"evaluate it: write questions of its task with right answers to {_TASK.replace('`', '')}, then"
    yield f"  {names.evaluate()}"
    yield "see it on a page:"
    yield f"  {names.report()}"


def where(contents: Contents, step: Step) -> str:
    """Return where to run a step's commands, which name local files without folders; "" if they name no local file."""
    names, moved, given = _Names.of(contents), contents.moved, f" {' '.join(step.commands)} "
    every = [names.folder, names.base]
    every += [] if moved is None else [moved.adapter.name or "", moved.source.ref or ""]
    local = [name for name in dict.fromkeys(every) if f" {quoted(name)} " in given and not is_hub_id(name)]
    if f" {quoted(names.recipe)} " in given:
        local = list(dict.fromkeys((names.folder, *local)))
    listed = ", ".join(f"`{visible(name)}`" for name in local)
    return f"Run it in the folder that holds {listed}, or give the paths." if local else ""


def _another_way(names: _Names, moved: TransferReport) -> Iterator[Step]:
    """Yield what would help; for a queried source without commands, which would need its address."""
    fit = moved.fit
    if fit is None and not moved.choice:
        said = f"Try another method than `{moved.recipe.method}`: by default, one is chosen that suits both models."
        yield Step(said, (names.transfer(moved, "another"),))
        return
    helping = [] if fit is None else list(remedies(fit))
    said = f"What would help: {'; '.join(helping) or 'an update that is fitted to answers of the source'}."
    given = dict[str, str]()
    if fit is not None:  # the recipe has the settings of the fit
        given["recipe"] = names.recipe
        if fit.planned < fit.usual:
            given["completions"] = str(fit.usual)
    if fit is None or fit.given < ENOUGH:
        said = f"{said} Write prompts of the adapter's task to `prompts.txt`, one a line."
        given["prompts"] = "prompts.txt"
    again = names.transfer(moved, "again") + "".join(f" --{name} {quoted(value)}" for name, value in given.items())
    yield Step(said, () if moved.asked else (again,))


def _naming(names: _Names, evaluation: Evaluation) -> Iterator[Step]:
    others = [model.name for model in evaluation.models if model.part == "other"]
    if evaluation.of_part("moved") is None and others:
        yield Step("Say which of the adapters is the moved one.", (names.report(f" --moved {quoted(others[0])}"),))


def _comparisons(names: _Names, evaluation: Evaluation, moved: TransferReport | None) -> Iterator[Step]:
    if evaluation.of_part("trained") is None:
        said = "Compare with training: train on examples in `train.jsonl` that are not in `task.jsonl`."
        train = f"jcrosslora train {quoted(names.base)} --data train.jsonl --out trained"
        yield Step(said, (train, names.evaluate(" --trained trained"), names.report()))
    if evaluation.of_part("random") is None and moved is not None and not moved.asked:
        said = "See whether a random update would do as well."
        random = f"{names.transfer(moved, 'random')} --method random"
        yield Step(said, (random, names.evaluate(" random"), names.report(" --random random")))
