"""`jcrosslora evaluate` and `report`: score a base with and without adapters, and write a page on a moved one."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro
from rich.console import Console

from jcrosslora.cli.output import (
    PAGE,
    OnDevice,
    given_base,
    opened_base,
    opened_shelf,
    print_json,
    print_tasks,
    say,
    warn,
    writable_file,
)
from jcrosslora.errors import UsageError
from jcrosslora.utils.files import write_output

if TYPE_CHECKING:
    from jcrosslora.adapter import Adapter
    from jcrosslora.checkpoint import BaseModel
    from jcrosslora.evaluate import Answers, Scores

Form = Literal["html", "svg", "pdf", "png"]
_ENDINGS: dict[Form, tuple[str, ...]] = {"html": PAGE, "svg": (".svg",), "pdf": (".pdf",), "png": (".png",)}
_ADVICE = "free space, or choose another file"  # where a file cannot be written


@dataclass(frozen=True)
class Evaluate(OnDevice):
    """Score a base, alone and with adapters, on a file of examples or on tasks of lm_eval; or judge a draft model.

    Questions with choices are scored by likelihood. For examples with "messages", or with "prompt" and "answer", the
    model writes answers, which are compared with the right ones.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "data": ("trained", "shelf", "compose", "top", "template", "max_new_tokens", "show", "html"),
        "tasks": ("num_fewshot", "include_path"),
        "draft": ("draft", "draft_adapter", "drafted"),
        **OnDevice.GROUPS,
    }

    data: Path | None = None
    """JSONL with {"messages"}, {"prompt", "answer"} or {"question", "choices", "answer": index} on each line."""
    tasks: str | None = None
    """Instead of --data: tasks of lm_eval by name, such as arc_easy,hellaswag; needs jcrosslora[eval]."""
    num_fewshot: int | None = None
    """Number of solved examples before each question; by default that of the task."""
    include_path: Path | None = None
    """Folder with YAML files of your tasks."""
    base: str | None = None
    """The base model: a folder of safetensors, a GGUF file or a hub id. A shelf knows its own."""
    adapter: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Adapters of this base to compare; with --shelf also names on it."""
    alpha: float | None = None
    """The training's alpha, for an adapter of a JAX trainer whose checkpoint does not state it."""
    trained: str | None = None
    """An adapter trained on this base: shows the share of its gain that each other adapter has."""
    shelf: Path | None = None
    """A shelf of adapters to score as one model: the adapters that suit an example answer it, or the base alone. For
    each --adapter, such as the one of the task, the output says what share of its gain the shelf keeps."""
    compose: str = "mixture"
    """How the adapters of the shelf act, as in generate."""
    top: int = 1
    """Use at most N adapters of the shelf for an example."""
    template: Path | None = None
    """File with a chat template for conversations, instead of the base's."""
    limit: int | None = None
    """Use the first N examples, of each task."""
    max_new_tokens: int | None = None
    """Maximum length of answers in tokens; by default that of the longest right one plus 16, at most 512."""
    show: int = 0
    """Print N examples from all over the file, with all answers to them."""
    html: Path | None = None
    """Write a page with the figures and all answers side by side to this file, replacing an old one."""
    draft: str | None = None
    """A small model with the base's vocabulary that drafts for it in speculative decoding. Shows how many of its tokens
    the base (with the --adapter, if given) accepts when it answers the prompts of --data."""
    draft_adapter: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Adapters of the draft to compare, such as the base's adapter moved to the draft."""
    drafted: int = 4
    """Number of tokens to draft for each pass of the base."""
    json: bool = False
    """Print the figures as JSON."""

    def run(self, console: Console) -> None:
        from jcrosslora.evaluate import Question, answer, read_examples, score

        self._check()
        if self.data is None:
            self._run_tasks(console)
            return
        if self.draft is not None:
            self._judge_draft(self.data, self.draft, console)
            return
        examples = read_examples(self.data)
        questions = [one for one in examples if isinstance(one, Question)]
        self._check_data(self.data, written=not questions)
        refs = [ref for group in self.adapter for ref in group if ref != self.trained]
        if self.shelf is not None:
            from jcrosslora.shelf import judge

            shelf = opened_shelf(self.shelf, self.base, self.template)
            limits: dict[str, Any] = {"top": self.top, "max_new_tokens": self.max_new_tokens}
            judged = judge(shelf, examples[: self.limit], self.compose, refs, **limits)
            self._print(judged.figures, judged.not_scored, console, {"shelf": judged.to_json()})
            for line in () if self.json else judged.lines():
                say(console, line)
            return
        refs += [] if self.trained is None else [self.trained]
        base, adapters = self._opened(refs)
        notes = _notes(adapters)
        if questions:
            found = score(base, questions[: self.limit], adapters)
        else:
            found = answer(base, examples[: self.limit], adapters, max_new_tokens=self.max_new_tokens)
        self._print(found, notes, console, {"digest": _digest(base)} if self.json else {})

    def _run_tasks(self, console: Console) -> None:
        """Judge base and adapters by tasks of lm_eval."""
        given_base(self.base)
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of lm_eval would run through our line
        from jcrosslora.evaluate.harness import Tasks

        tasks = Tasks((self.tasks or "").strip(",").split(","), self.include_path)
        base, adapters = self._opened([ref for group in self.adapter for ref in group])
        figures = tasks.judge(base, adapters, limit=self.limit, num_fewshot=self.num_fewshot)
        notes = _notes(adapters)
        if self.json:
            print_json({"tasks": figures, "not_scored": notes, "digest": _digest(base)})
            return
        for note in notes:
            say(console, f"not scored: {note}")
        print_tasks(figures, console)

    def _opened(self, refs: Sequence[str]) -> "tuple[BaseModel, list[Adapter]]":
        """Open the base and its adapters, and warn of adapters that belong to another base."""
        from jcrosslora.adapter import find_adapter, load_adapter
        from jcrosslora.adapter.origin import other_base
        from jcrosslora.adapter.records import why_idle

        base = opened_base(self.base, self.template)
        given = set() if self.alpha is None else {ref for ref in refs if find_adapter(ref).form == "Orbax"}
        if self.alpha is not None and not given:
            msg = f"alpha {self.alpha} was given, and no adapter is a checkpoint of a JAX trainer: leave it out"
            raise UsageError(msg)
        adapters = [load_adapter(ref, base, alpha=self.alpha if ref in given else None) for ref in refs]
        warn(doubt for one in adapters for doubt in (other_base(one.info, base), why_idle(one)))
        return base, adapters

    def _judge_draft(self, data: Path, draft: str, console: Console) -> None:
        """Judge a draft model, alone and with adapters, by the answers of the base to the prompts of a file."""
        from jcrosslora.adapter import load_adapter
        from jcrosslora.checkpoint import open_base
        from jcrosslora.cli.output import print_drafts
        from jcrosslora.evaluate import judge_draft
        from jcrosslora.evaluate.examples import read_prompts

        refs, moved = ([ref for group in groups for ref in group] for groups in (self.adapter, self.draft_adapter))
        if len(refs) > 1:
            msg = f"--adapter names {len(refs)} adapters, and the base answers with one: give those of the draft with "
            raise UsageError(msg + "--draft-adapter")
        (base, own), small = self._opened(refs), open_base(draft)
        adapters = [load_adapter(ref, small) for ref in moved]
        room, adapter = 128 if self.max_new_tokens is None else self.max_new_tokens, own[0] if own else None
        prompts = read_prompts(data)[: self.limit]
        found = judge_draft(base, small, prompts, adapter, adapters, drafted=self.drafted, max_new_tokens=room)
        print_drafts(found, _notes([*own, *adapters]), console, as_json=self.json)

    def _check(self) -> None:
        """Refuse options that do not go together, before any work."""
        if (self.data is None) == (self.tasks is None):
            came = "neither --data nor --tasks was" if self.data is None else "both --data and --tasks were"
            msg = f"{came} given: give a file of examples with --data, or names of lm_eval's tasks with --tasks"
            raise UsageError(msg)
        mode = "tasks" if self.data is None else "data" if self.draft is None else "draft"
        allowed = {*self.GROUPS[mode], *(("template", "max_new_tokens") if mode == "draft" else ())}
        for one in fields(self):
            group = next((each for each in ("data", "tasks", "draft") if one.name in self.GROUPS[each]), None)
            if group and one.name not in allowed and getattr(self, one.name) != one.default:
                more = ", or give a --draft" if (mode, group) == ("data", "draft") else ""
                raise UsageError(f"--{one.name.replace('_', '-')} is not for --{mode}: leave it out{more}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"num-fewshot {self.num_fewshot} is out of range; it must be at least 0")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit {self.limit} is out of range; it must be at least 1")

    def _check_data(self, data: Path, *, written: bool) -> None:
        """Refuse what cannot be done with a file of examples."""
        if self.shelf is None and (self.top != 1 or self.compose != "mixture"):
            msg = f"compose {self.compose} with top {self.top} and no shelf: they say how the adapters of a shelf act, "
            raise UsageError(msg + "give it with --shelf")
        if self.shelf is not None and self.alpha is not None:
            msg = f"--alpha {self.alpha} was given with the shelf {self.shelf}, which reads no checkpoints of JAX "
            raise UsageError(msg + "trainers: leave it out")
        if self.shelf is not None and self.trained is not None:
            msg = f"--trained {self.trained} was given with the shelf {self.shelf}: give it as --adapter, to see "
            raise UsageError(msg + "the share of its gain that the shelf keeps")
        if self.show < 0 or (self.max_new_tokens is not None and self.max_new_tokens < 1):
            msg = f"show {self.show} with max-new-tokens {self.max_new_tokens} is out of range; expected 0 or more to "
            msg += "show, and 1 token or more"
            raise UsageError(msg)
        if not written and (self.show or self.html or self.max_new_tokens):
            msg = f"{data}: holds questions with choices, which are not answered in writing: leave out --show, "
            msg += '--html and --max-new-tokens, or give lines of {"messages"} or {"prompt", "answer"}'
            raise UsageError(msg)
        if self.html is not None:
            writable_file(self.html, PAGE)

    def _print(
        self, found: "Scores | Answers", notes: Sequence[str], console: Console, more: dict[str, Any] | None = None
    ) -> None:
        """Print the figures, as JSON with `more`, and write the page."""
        from jcrosslora.evaluate import Answers, answers_json, answers_page, print_answers, print_scores, scores_json
        from jcrosslora.evaluate.output import lift_lines

        trained = None if self.trained is None else found.names[-1]
        written = isinstance(found, Answers)
        if self.html is not None and written:
            write_output(writable_file(self.html, PAGE), answers_page(found).encode(), _ADVICE)
        if self.json:
            if written:
                data = answers_json(found, notes, show=self.show, trained=trained)
            else:
                data = scores_json(found, notes, trained=trained)
            print_json(data | (more or {}))
            return
        for note in notes:
            say(console, f"not scored: {note}")
        if written:
            print_answers(found, console, show=self.show)
        else:
            print_scores(found, console)
        for line in [] if trained is None else lift_lines(found, len(found.names) - 1):
            say(console, line)
        if self.html is not None and written:
            say(console, f"written: {self.html}")


def _notes(adapters: "Sequence[Adapter]") -> list[str]:
    """List the parts of the adapters that the figures do not include."""
    from jcrosslora.adapter.records import left_out
    from jcrosslora.checkpoint.hub import public_names
    from jcrosslora.decoder.model import RUN

    return [
        f"{name}: {sentence}"
        for name, adapter in zip(public_names(adapter.info.name for adapter in adapters), adapters, strict=True)
        for sentence in left_out(adapter, RUN, "bases are run without it")
    ]


def _digest(base: "BaseModel") -> str:
    from jcrosslora.utils.cache import open_cache

    cache = open_cache()
    return base.digest(None if cache is None else cache.digests)


@dataclass(frozen=True)
class Report:
    """Write a page on a moved adapter: does it work, answers before and after, pictures, how it was made."""

    folder: tyro.conf.Positional[Path]
    """A folder that `jcrosslora transfer` wrote, or one that holds the output of `jcrosslora evaluate --json`."""
    answers: Path | None = None
    """The output of `jcrosslora evaluate --show 10 --json`; by default the one in the folder."""
    moved: str | None = None
    """Name of the moved adapter in the evaluation; by default the folder's name, or the only adapter."""
    trained: str | None = None
    """Name of the adapter in the evaluation that was trained on the target; by default as the file says."""
    random: str | None = None
    """Name of the adapter in the evaluation that was moved by method random."""
    out: Path | None = None
    """The file to write, replacing an old one; by default report.html (or .svg and so on) in the folder."""
    format: Form | None = None
    """html: the page. svg, pdf, png: only verdict and pictures. By default by the ending of the file's name."""

    def run(self, console: Console) -> None:
        from jcrosslora.report.page import Roles, find_contents, report_page, report_sheet

        form = self._form()
        contents = find_contents(self.folder, self.answers, Roles(self.moved, self.trained, self.random))
        out = writable_file(self.out or self.folder / f"report.{form}", _ENDINGS[form])
        content = report_page(contents).encode() if form == "html" else report_sheet(contents, form)
        write_output(out, content, _ADVICE)
        say(console, f"written: {out}")

    def _form(self) -> Form:
        if self.format is not None or self.out is None:
            return self.format or "html"
        for form, endings in _ENDINGS.items():
            if self.out.suffix.lower() in endings:
                return form
        raise UsageError(f"{self.out}: does not say what to write: give a file that ends in .html, .svg, .pdf or .png")
