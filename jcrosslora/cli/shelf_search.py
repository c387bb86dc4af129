"""`jcrosslora shelf search`, `train` and `evaluate`: find adapters for prompts, and judge how well that works."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Table

from jcrosslora.cli.output import one_line, print_json, say

if TYPE_CHECKING:
    from jcrosslora.evaluate.bootstrap import Interval


@dataclass(frozen=True)
class Search:
    """Find the adapters whose task a prompt is of; "none" where it is of no adapter's, and the base alone suits."""

    folder: tyro.conf.Positional[Path]
    """The folder of the shelf."""
    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """One or more prompts."""
    prompts: Path | None = None
    """File of further prompts: one a line, or JSONL with "text", "prompt" or "messages"."""
    by: str | None = None
    """How: text (vectors of samples, the default), tfidf (their words), certainty (how much an adapter changes what the
    base predicts; runs every adapter) or weights (vectors of weights, see `shelf train`)."""
    top: int = 1
    """At most so many adapters for a prompt."""
    base: str | None = None
    """The base, if it has moved."""
    json: bool = False
    """Print names and scores as JSON."""

    def run(self, console: Console) -> None:
        """Print a line for each prompt."""
        from jcrosslora.evaluate.probes.text_files import read_prompts
        from jcrosslora.shelf import Shelf
        from jcrosslora.text import Prompt
        from jcrosslora.text.completion import prompt_text

        given: list[Prompt] = [*self.prompt, *(read_prompts(self.prompts) if self.prompts is not None else ())]
        shelf = Shelf(self.folder, self.base)
        found = shelf.search(given, self.by).best(self.top)
        if self.json:
            print_json(
                [
                    {"prompt": sample_json(one), "adapters": [_scored(*each) for each in best]}
                    for one, best in zip(given, found, strict=True)
                ]
            )
            return
        for prompt, best in zip(given, found, strict=True):
            names = ", ".join(f"{name} ({score:.2f})" for name, score in best)
            say(console, f"{names or 'none'}: {one_line(prompt_text(prompt), 80)}")


@dataclass(frozen=True)
class Train:
    """Train the encoder of adapters by their weights, for `shelf search --by weights`."""

    folder: tyro.conf.Positional[Path]
    """The folder of the shelf."""
    steps: int = 300
    """Updates of the encoder, each with 8 adapters and a sample of each."""
    rate: float = 1e-3
    """The highest learning rate."""
    seed: int = 0
    """Of all that is drawn."""
    base: str | None = None
    """The base, if it has moved."""

    def run(self, console: Console) -> None:
        """Train, and print the loss at the beginning and the end."""
        from jcrosslora.shelf import ProbeSettings, Shelf

        settings = ProbeSettings(steps=self.steps, rate=self.rate, seed=self.seed)
        losses = Shelf(self.folder, self.base).train_probes(settings)
        say(console, f"{self.folder}: {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}")


@dataclass(frozen=True)
class Evaluate:
    """Judge ways to search by prompts whose adapters are known."""

    folder: tyro.conf.Positional[Path]
    """The folder of the shelf."""
    samples: tyro.conf.UseAppendAction[tuple[str, ...]]
    """NAME=FILE, or NAME,NAME=FILE where several adapters are of the task; may be given several times. FILE holds
    prompts of the task that are not among the adapter's samples."""
    unrelated: Path | None = None
    """Prompts of no adapter's task, for the share of them that gets an adapter all the same."""
    by: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A way to search, as for `shelf search`; may be given several times. Without it text and tfidf."""
    limit: int = 200
    """At most so many prompts of each file, evenly spread."""
    base: str | None = None
    """The base, if it has moved."""
    json: bool = False
    """Print the figures as JSON."""

    def run(self, console: Console) -> None:
        """Print a row for each way to search."""
        from jcrosslora.shelf import Shelf, accuracy, labelled_prompts

        prompts, wanted = labelled_prompts(self.samples, self.unrelated, self.limit)
        shelf = Shelf(self.folder, self.base)
        found = {by: accuracy(shelf.search(prompts, by), wanted) for by in self.by or ("text", "tfidf")}
        if self.json:
            print_json({"prompts": len(prompts), "by": {by: dataclasses.asdict(one) for by, one in found.items()}})
            return
        table = Table("by", "top-1", "top-3", "answered by a right one", "adapter for unrelated")
        for by, one in found.items():
            table.add_row(by, *map(_interval, (one.top1, one.top3, one.answered, one.false)))
        console.print(table)


def sample_json(prompt: Any) -> Any:
    """Return a prompt as JSON data."""
    from jcrosslora.text.completion import message_entries

    return prompt if isinstance(prompt, str) else {"messages": message_entries(prompt)}


def _interval(value: "Interval | None") -> str:
    return "-" if value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _scored(name: str, score: float) -> dict[str, Any]:
    return {"adapter": name, "score": score}
