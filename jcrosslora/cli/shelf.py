"""`jcrosslora shelf`: keep an index of adapters of one base, and find the ones that suit a prompt."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Column
from rich.text import Text

from jcrosslora.cli.output import print_json, print_table, say, title_of
from jcrosslora.errors import AdapterError, UsageError

if TYPE_CHECKING:
    from jcrosslora.evaluate import Interval
    from jcrosslora.shelf import Shelf, ShelfEntry


@dataclass(frozen=True)
class _OnShelf:
    folder: tyro.conf.Positional[Path]
    """The folder of the shelf."""

    def _opened(self, base: str | None = None, encoder: str | None = None) -> "Shelf":
        from jcrosslora.shelf import Shelf

        return Shelf(self.folder, base, encoder=encoder)


@dataclass(frozen=True)
class Add(_OnShelf):
    """Add adapters, or all in a folder such as the output of a batch; creates the shelf if missing."""

    adapters: tyro.conf.Positional[tuple[str, ...]]
    """Adapters, hub ids, or folders of adapters."""
    base: str | None = None
    """The base of all adapters: a folder of safetensors, a GGUF file or a hub id. A new shelf needs it; later it is
    needed if the base has moved."""
    prompts: Path | None = None
    """File with prompts of the adapters' task, in the form of transfer's --prompts: samples to find the adapters by. By
    default the prompts that the source wrote for the transfer."""
    name: str | None = None
    """Name of a single adapter instead of that of its folder."""
    lift: float | None = None
    """The share of a trained adapter's gain that a single adapter recovers, if you have measured it."""
    encoder: str | None = None
    """For a new shelf, what computes vectors of samples. hidden, the default: hidden states of the base.
    sentences:MODEL: a model of sentence-transformers. none: no vectors, for searches by words."""

    def run(self, console: Console) -> None:
        from jcrosslora.adapter.folder import is_adapter
        from jcrosslora.shelf.adding import find_adapters
        from jcrosslora.shelf.records import given_samples

        if not self.adapters:
            msg = f"no adapter was given for the shelf {self.folder}: give adapters, or a folder with adapters below"
            raise UsageError(msg)
        for ref in self.adapters:  # before a new shelf is made
            find_adapters(ref)
        if self.prompts is not None:
            given_samples(self.prompts)
        shelf = self._opened(self.base, self.encoder)
        try:
            found = shelf.add(self.adapters, name=self.name, prompts=self.prompts, lift=self.lift)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("what was added stays, and the same command goes on from there") from None
        for name in found.added:
            say(console, f"added: {name} ({_facts(shelf.entry(name))})")
        for name in found.kept:
            say(console, f"kept: {name}, which was on the shelf as it is")
        for one in found.refused:
            say(console, f"not added: {one.place}: {one.reason}")
        say(console, f"{self.folder}: {len(shelf)} adapters of {shelf.info.name}")
        # Of what lies below a folder the damaged are left out; what was named is an error.
        named = {str(Path(ref).expanduser()) for ref in self.adapters if is_adapter(Path(ref).expanduser())}
        if bad := [one for one in found.refused if one.place in named or one.place in self.adapters]:
            raise AdapterError(f"{bad[0].place}: not added: {bad[0].reason}")


@dataclass(frozen=True)
class List(_OnShelf):
    """Show every adapter with its rank, samples, origin and its effect."""

    json: bool = False
    """Print the entries as JSON, without samples."""

    def run(self, console: Console) -> None:
        shelf = self._opened()
        if self.json:
            found = [_json(shelf, entry) for entry in shelf.entries]
            print_json({"base": asdict(shelf.info), "encoder": shelf.encoder_name, "adapters": found})
            return
        names = ("adapter", "rank", "samples", "base", "moved from", "expected", "lift", "files")
        rows = (
            (
                Text(entry.name),
                str(entry.rank),
                f"{len(entry.samples)} ({entry.samples_from})",
                "verified" if entry.verified else "not verified",
                Text(f"{entry.earlier[-1].adapter} ({entry.earlier[-1].base})" if entry.earlier else "-"),
                entry.verdict or "-",
                "-" if entry.lift is None else f"{entry.lift:.2f}",
                "missing" if shelf.missing(entry) else f"{entry.size / 1e6:.1f} MB",
            )
            for entry in shelf.entries
        )
        if len(shelf):
            print_table(console, [Column(name, overflow="fold") for name in names], rows)
        say(console, f"{self.folder}: {len(shelf)} adapters of {shelf.info.name}, encoder {shelf.encoder_name}")


@dataclass(frozen=True)
class Show(_OnShelf):
    """Show one adapter with its samples."""

    name: tyro.conf.Positional[str]
    """The adapter."""
    json: bool = False
    """Print it as JSON."""

    def run(self, console: Console) -> None:
        from jcrosslora.adapter.origin import describe_history
        from jcrosslora.text import prompt_text

        shelf = self._opened()
        entry = shelf.entry(self.name)
        if self.json:
            print_json(_json(shelf, entry) | {"samples": list(map(_sample_json, entry.samples))})
            return
        base = "verified by the adapter's record" if entry.verified else "not verified, its shapes fit"
        say(console, f"{entry.name}: {entry.kind} of rank {entry.rank}, {entry.modules} modules")
        say(console, f"files: {shelf.place(entry.name)}{' (missing)' if shelf.missing(entry) else ''}, {entry.digest}")
        say(console, f"base: {shelf.info.name}, {base}")
        if entry.earlier:
            history = describe_history(entry.earlier, shelf.info.name)
            say(console, f"line: {history}; original {entry.earlier[0].digest}")
        if entry.verdict is not None:
            outcome = "" if entry.effect is None else f"; measured effect: {entry.effect.get('outcome')}"
            say(console, f"expected: {entry.verdict}{outcome}")
        if entry.lift is not None:
            say(console, f"lift: {entry.lift:.2f} of a trained adapter's gain")
        if entry.licence is not None:
            say(console, f"licence: {entry.licence}")
        say(console, f"samples: {len(entry.samples)}, from {entry.samples_from}")
        for sample in entry.samples:
            say(console, f"  {' '.join(prompt_text(sample).split())[:200]}")


@dataclass(frozen=True)
class Remove(_OnShelf):
    """Take adapters off the shelf; their files stay."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """The adapters."""

    def run(self, console: Console) -> None:
        shelf = self._opened()
        shelf.remove(self.names)
        for name in self.names:
            say(console, f"removed: {name}")
        say(console, f"{self.folder}: {len(shelf)} adapters of {shelf.info.name}")


@dataclass(frozen=True)
class Search(_OnShelf):
    """Find the adapters that suit a prompt; "none" if the base alone should answer."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """One or more prompts."""
    prompts: Path | None = None
    """File of further prompts: one a line, or JSONL with "text", "prompt" or "messages"."""
    by: str | None = None
    """How: text (vectors of samples, the default), tfidf (their words) or weights (vectors of weights, see `shelf
    train`)."""
    top: int = 1
    """Find at most N adapters for a prompt."""
    base: str | None = None
    """The base, if it has moved."""
    json: bool = False
    """Print names and scores as JSON."""

    def run(self, console: Console) -> None:
        from jcrosslora.evaluate.examples import read_prompts

        given = [*self.prompt, *(read_prompts(self.prompts) if self.prompts is not None else ())]
        found = self._opened(self.base).search(given, self.by).best(self.top)
        if self.json:
            shown = [[{"adapter": name, "score": score} for name, score in best] for best in found]
            pairs = zip(map(_sample_json, given), shown, strict=True)
            print_json([{"prompt": prompt, "adapters": best} for prompt, best in pairs])
            return
        for prompt, best in zip(given, found, strict=True):
            names = ", ".join(f"{name} ({score:.2f})" for name, score in best)
            say(console, f"{names or 'none'}: {title_of(prompt, 80)}")


@dataclass(frozen=True)
class Train(_OnShelf):
    """Train the encoder of adapters by their weights, for `shelf search --by weights`."""

    steps: int = 300
    """Training steps, each with 8 adapters and a sample of each."""
    rate: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of everything random."""
    base: str | None = None
    """The base, if it has moved."""

    def run(self, console: Console) -> None:
        from jcrosslora.shelf import ProbeSettings

        settings = ProbeSettings(steps=self.steps, rate=self.rate, seed=self.seed)
        losses = self._opened(self.base).train_probes(settings)
        say(console, f"{self.folder}: {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}")


@dataclass(frozen=True)
class Evaluate(_OnShelf):
    """Score ways to search on prompts whose adapters are known."""

    samples: tyro.conf.UseAppendAction[tuple[str, ...]]
    """NAME=FILE, or NAME,NAME=FILE if several adapters have the same task; may be given several times. FILE holds
    prompts of the task that are not among the adapter's samples."""
    unrelated: Path | None = None
    """Prompts of no adapter's task, to measure how many of them get an adapter."""
    by: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A way to search, as for `shelf search`; may be given several times. By default text and tfidf."""
    limit: int = 200
    """Use at most N prompts from all over each file."""
    base: str | None = None
    """The base, if it has moved."""
    json: bool = False
    """Print the figures as JSON."""

    def run(self, console: Console) -> None:
        from jcrosslora.shelf import accuracy, labelled_prompts

        prompts, wanted = labelled_prompts(self.samples, self.unrelated, self.limit)
        shelf = self._opened(self.base)
        found = {by: accuracy(shelf.search(prompts, by), wanted) for by in self.by or ("text", "tfidf")}
        if self.json:
            print_json({"prompts": len(prompts), "by": {by: asdict(one) for by, one in found.items()}})
            return
        names = "by", "top-1", "top-3", "answered by a right one", "adapter for unrelated"
        rows = ((by, *map(_interval, (one.top1, one.top3, one.answered, one.false))) for by, one in found.items())
        print_table(console, names, rows)


ACTIONS = {
    "add": Add,
    "list": List,
    "show": Show,
    "remove": Remove,
    "search": Search,
    "train": Train,
    "evaluate": Evaluate,
}


def _facts(entry: "ShelfEntry") -> str:
    count = len(entry.samples)
    samples = f"{count} samples from {entry.samples_from}" if count else "no samples: give --prompts"
    return samples if entry.verified else f"{samples}; its base is not verified, its shapes fit"


def _json(shelf: "Shelf", entry: "ShelfEntry") -> dict[str, Any]:
    more = {"samples": len(entry.samples), "missing": shelf.missing(entry), "place": shelf.place(entry.name)}
    return asdict(entry) | more


def _sample_json(prompt: Any) -> Any:
    """Return a prompt as JSON data."""
    from jcrosslora.text.completion import message_entries

    return prompt if isinstance(prompt, str) else {"messages": message_entries(prompt)}


def _interval(value: "Interval | None") -> str:
    return "-" if value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
