"""Which jobs of a batch are done: one small file for each, by what the job was made from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from jcrosslora.adapter import AdapterInfo
from jcrosslora.batch.plan_file import Job
from jcrosslora.cache.keys import digest_of, tokenizer_key, weights_key
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import OutputError
from jcrosslora.methods import Method
from jcrosslora.utils.files import write_whole

FOLDER = ".batch"
# What does not change the numbers: where things are, and what is checked afterwards but for the report.
_NO_PART = ("adapter", "source", "target", "out", "overwrite", "cache")


class CompletionLog:
    """The record of a batch's finished jobs, in a hidden folder beside their results.

    A job counts as done if its folder is there and the record says that it was made from the same numbers: the same
    settings, probe texts, bases (weights, configuration and tokenizer), adapter, and version of the package. Folders
    appear whole or not at all, so a batch that was killed at any point goes on where it was.
    """

    def __init__(self, out: Path) -> None:
        self._folder = out / FOLDER

    def is_done(self, job: Job, fingerprint: str) -> bool:
        """Whether the job's folder is there and was made from what `fingerprint` (see `fingerprint_of`) stands for."""
        if not Path(job.settings.out).is_dir():
            return False
        try:
            return json.loads(self._path(job).read_bytes())["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @contextmanager
    def writing(self, job: Job, fingerprint: str) -> Iterator[None]:
        """A block that writes the job's folder.

        The record of a new folder is written first: killed between the two, the folder is missing. That of a folder
        that is replaced is written last, or the old one would count as the new.

        Raises:
            OutputError: the record cannot be written.
        """
        replaces = Path(job.settings.out).exists()
        if replaces:
            self._forget(job)
        else:
            self._write(job, fingerprint)
        yield
        if replaces:
            self._write(job, fingerprint)

    def _forget(self, job: Job) -> None:
        with self._changing():
            self._path(job).unlink(missing_ok=True)

    def _write(self, job: Job, fingerprint: str) -> None:
        with self._changing():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(job), json.dumps({"fingerprint": fingerprint}).encode(), sync=True)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            msg = f"{self._folder}: cannot be written ({error.strerror}): make it writable, or free space"
            raise OutputError(msg) from error

    def _path(self, job: Job) -> Path:
        return self._folder / f"{job.name}.json"


def base_fingerprint(base: BaseModel) -> str:
    """What a base is for a job: its weights, its configuration and its tokenizer."""
    return digest_of(weights_key(base), tokenizer_key(base))


def fingerprint_of(job: Job, adapter: AdapterInfo, source: str, target: str, texts: str) -> str:
    """What a job is made from, as one hex string.

    Args:
        job: its settings count, apart from where its files are.
        adapter: the digest of its weights counts, and its configuration, which scales them.
        source: from `base_fingerprint`.
        target: likewise.
        texts: digest of those of `probe_text`; "" where the settings name no such file.
    """
    settings = {key: value for key, value in job.settings.flat().items() if key not in _NO_PART}
    method = job.settings.method
    code = method.cache_key() if isinstance(method, Method) else None  # of a user's own method its file counts
    return digest_of(version("jcrosslora"), settings, code, adapter.digest, adapter.config, source, target, texts)
