"""`jcrosslora push`: upload an adapter's folder to the hub."""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console

from jcrosslora.cli.output import print_json, say
from jcrosslora.report.hub import Pushed, check_repo_id, push_folder
from jcrosslora.report.upload import collect


@dataclass(frozen=True)
class Push:
    """Upload an adapter's folder to the hub: weights, model card, report and recipe. The folder is not changed.

    The token is that of HF_TOKEN or of `hf auth login`. After a failure the same command goes on.
    """

    folder: tyro.conf.Positional[Path]
    """The adapter: a folder of PEFT or MLX, or with adapter.gguf, such as `jcrosslora transfer` writes."""
    repo_id: tyro.conf.Positional[str]
    """Where to: OWNER/NAME. The repository is made if it is not there."""
    public: bool = False
    """Make the repository public, or allow that it is; else it is private."""
    base_model: str | None = None
    """Hub id of the base, for card and configuration, where they name none: the base was a local file."""
    with_completions: bool = False
    """Keep the completions that the source wrote in report and card; they may hold what is private."""
    dry_run: bool = False
    """Only check the folder, and show what would be uploaded; the hub is not asked."""
    json: bool = False
    """Print what was uploaded as JSON."""

    def run(self, console: Console) -> None:
        """Upload, or show what would be uploaded."""
        if self.dry_run:
            self._show(console)
            return
        pushed = push_folder(
            self.folder,
            self.repo_id,
            private=not self.public,
            base_model=self.base_model,
            with_completions=self.with_completions,
        )
        if self.json:
            print_json(asdict(pushed))
            return
        print_pushed(pushed, console)

    def _show(self, console: Console) -> None:
        check_repo_id(self.repo_id)
        upload = collect(self.folder, base_model=self.base_model, with_completions=self.with_completions)
        sizes = {name: _size(sent) for name, sent in upload.files.items()}
        if self.json:
            print_json({"files": sizes, "base_model": upload.base_model, "notes": upload.notes})
            return
        for note in upload.notes:
            say(console, f"note: {note}")
        say(console, f"base model: {upload.base_model or 'none'}")
        for name, size in sizes.items():
            say(console, f"would upload: {name} ({size:,} bytes)")


def _size(sent: Path | bytes) -> int:
    return len(sent) if isinstance(sent, bytes) else sent.stat().st_size


def print_pushed(pushed: Pushed, console: Console) -> None:
    """Print the notes on an upload, and where it is."""
    for note in pushed.notes:
        say(console, f"note: {note}")
    say(console, f"uploaded: {pushed.url} (commit {pushed.commit[:12]}, {len(pushed.files)} files)")
