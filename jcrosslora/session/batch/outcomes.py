"""The outcomes of a batch: the summary of a run, and the log of finished jobs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console
from rich.table import Column

from jcrosslora.adapter import AdapterInfo, find_adapter
from jcrosslora.adapter.folder import CHAT_TEMPLATE
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base import weights_key
from jcrosslora.checkpoint.hub import publish
from jcrosslora.checkpoint.tokenizer import tokenizer_key
from jcrosslora.errors import AdapterError, OutputError
from jcrosslora.methods import Method
from jcrosslora.session.batch.plan import Job
from jcrosslora.utils import version
from jcrosslora.utils.digests import digest_of, file_state, is_settled
from jcrosslora.utils.files import write_whole
from jcrosslora.utils.terminal import print_table

Status = Literal["done", "kept", "failed", "open"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one job.

    Attributes:
        status: "done" in this run, "kept" from an earlier run, "failed", or "open" (not reached).
        text: the verdict on the moved adapter, or the error.
        seconds: time since the end of the previous job; for the first job of a unit this includes the shared work.
    """

    name: str
    out: str
    status: Status = "open"
    text: str = ""
    seconds: float = 0.0


@dataclass
class Summary:
    """The outcomes of all jobs of a run, by name, in the order of the plan; jobs not reached are open."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def of(cls, jobs: Iterable[Job]) -> Summary:
        """List jobs that nobody has reached yet."""
        return cls({job.name: Outcome(job.name, job.settings.out) for job in jobs})

    def count(self, status: Status) -> int:
        """Count the jobs with a status."""
        return sum(outcome.status == status for outcome in self.outcomes.values())

    def to_json(self) -> str:
        """Return the counts and every outcome as JSON."""
        counts = {status: self.count(status) for status in get_args(Status)}
        return json.dumps({**counts, "jobs": [asdict(one) for one in self.outcomes.values()]}, indent=2) + "\n"

    def save(self, path: Path, jobs: Iterable[Job]) -> None:
        """Write `to_json` to a file, atomically and without local paths."""
        paths = {job.name: job.settings.paths() for job in jobs if job.name in self.outcomes}
        shown = {name: Outcome(**publish(asdict(self.outcomes[name]), own)) for name, own in paths.items()}
        with _writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, Summary(shown).to_json().encode())

    def print_to(self, console: Console) -> None:
        """Print a table of all jobs."""
        found = self.outcomes.values()
        rows = ((one.name, one.status, f"{one.seconds:.1f}" if one.seconds else "", one.text) for one in found)
        print_table(console, (Column("job", overflow="fold"), "status", "s", Column(overflow="fold")), rows)


# Settings that do not change the result: locations of files, whose contents are digested, and cache and overwriting.
_NO_PART = (
    *("adapter", "source", "target", "prompts", "examples", "source_template", "target_template"),
    *("out", "overwrite", "cache", "divide"),
)


class CompletionLog:
    """The log of a batch's finished jobs, in a hidden folder next to their results.

    A job counts as done if its folder exists and the log has the fingerprint of the same inputs: settings, probe texts,
    bases (weights, configuration, tokenizer and chat template), adapter, and version of the package. Folders are
    written atomically, so a batch that was killed at any point can be resumed. A stamp next to the fingerprint
    recognises a finished job without reading its adapter: its files still have the same sizes and times.
    """

    def __init__(self, out: Path) -> None:
        self._folder = out / ".batch"

    def has(self, job: Job, name: Literal["fingerprint", "stamp"], digest: str | None) -> bool:
        """Tell whether the job's folder exists and its inputs had this digest; False for None."""
        try:
            entry = json.loads(self._path(job).read_bytes()) if Path(job.settings.out).is_dir() else {}
        except (OSError, ValueError):
            return False
        return digest is not None and isinstance(entry, dict) and entry.get(name) == digest

    @contextmanager
    def writing(self, job: Job, fingerprint: str, stamp: str | None) -> Iterator[None]:
        """Log a job around the block that writes its folder.

        The entry of a new folder is written first: if the run is killed in between, the folder is missing and the job
        not done. The entry of a replaced folder is written last, otherwise the old folder would count as the new.
        """
        replaces = Path(job.settings.out).exists()
        if replaces:
            with _writable(self._folder):
                self._path(job).unlink(missing_ok=True)
            yield
        with _writable(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            entry = {"fingerprint": fingerprint, "stamp": stamp}
            write_whole(self._path(job), json.dumps(entry).encode(), sync=True)
        if not replaces:
            yield

    def _path(self, job: Job) -> Path:
        return self._folder / f"{job.name}.json"


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turn an `OSError` in the block into an `OutputError` that names the file or folder."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}): make it writable, or free space") from error


def base_fingerprint(base: BaseModel) -> str:
    """Digest the weights, the configuration, the tokenizer and the chat template of a base."""
    return digest_of(weights_key(base), tokenizer_key(base))


def fingerprint_of(job: Job, adapter: AdapterInfo, *shared: str) -> str:
    """Digest all inputs of a job, as a hex string.

    The adapter counts by its weights, configuration (which scales them) and chat template; the settings count without
    locations. `shared` are the fingerprints of source and target (see `base_fingerprint`), and the digest of the
    prompts and labelled examples, "" if the settings name no file.
    """
    return digest_of(*_asked(job), adapter.digest, adapter.config, adapter.chat_template, *shared)


def stamp_of(job: Job, *shared: str) -> str | None:
    """Digest all inputs of a job as `fingerprint_of` does, but the adapter by the sizes and times of its files.

    Returns:
        A hex string. None if the adapter is not in local files, is an Orbax checkpoint, or its files are so new that a
        second write could leave the same times.
    """
    if not os.path.exists(job.settings.adapter):
        return None
    try:
        files = find_adapter(job.settings.adapter, job.settings.adapter_revision)
    except AdapterError:
        return None
    if files.weights.is_dir():
        return None
    template = None if files.folder is None else files.folder / CHAT_TEMPLATE
    paths = files.weights, files.config, template if template is not None and template.exists() else None
    states = [None if path is None else file_state(path) for path in paths]
    now = time.time_ns()
    if not all(path is None or (state and is_settled(state, now)) for path, state in zip(paths, states, strict=True)):
        return None
    return digest_of(*_asked(job), states, *shared)


def _asked(job: Job) -> tuple[object, ...]:
    """Return the version of the package, and the requested settings."""
    settings = {key: value for key, value in job.settings.flat().items() if key not in _NO_PART}
    method = job.settings.method
    code = method.cache_key() if isinstance(method, Method) else None  # includes the file of a user's own method
    given = [name for name in ("prompts", "examples") if getattr(job.settings, name) is not None]
    return version(), settings, given, code
