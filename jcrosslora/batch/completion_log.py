"""The completion log of a batch: one small file for each finished job, with a fingerprint of its inputs."""

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
# Settings that do not change the result: locations of files, and cache and overwriting.
_NO_PART = ("adapter", "source", "target", "out", "overwrite", "cache")


class CompletionLog:
    """The log of a batch's finished jobs, in a hidden folder beside their results.

    A job counts as done if its folder exists and the log has the fingerprint of the same inputs: settings, probe texts,
    bases (weights, configuration and tokenizer), adapter, and version of the package. Folders are written atomically,
    so a batch that was killed at any point can be resumed.
    """

    def __init__(self, out: Path) -> None:
        self._folder = out / FOLDER

    def is_done(self, job: Job, fingerprint: str) -> bool:
        """Tell whether the job's folder exists and its inputs had this fingerprint (see `fingerprint_of`)."""
        if not Path(job.settings.out).is_dir():
            return False
        try:
            return json.loads(self._path(job).read_bytes())["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @contextmanager
    def writing(self, job: Job, fingerprint: str) -> Iterator[None]:
        """Log a job around the block that writes its folder.

        The entry of a new folder is written first: if the run is killed in between, the folder is missing and the job
        not done. The entry of a replaced folder is written last, otherwise the old folder would count as the new.

        Raises:
            OutputError: the log cannot be written.
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
    """Digest the weights, the configuration and the tokenizer of a base."""
    return digest_of(weights_key(base), tokenizer_key(base))


def fingerprint_of(job: Job, adapter: AdapterInfo, source: str, target: str, texts: str) -> str:
    """Digest all inputs of a job, as a hex string.

    Args:
        job: the job; its settings count, except locations of files.
        adapter: its adapter; the digest of the weights and the configuration, which scales them, count.
        source: fingerprint of the source, from `base_fingerprint`.
        target: likewise of the target.
        texts: digest of the texts of `probe_text`; "" if the settings name no such file.
    """
    settings = {key: value for key, value in job.settings.flat().items() if key not in _NO_PART}
    method = job.settings.method
    code = method.cache_key() if isinstance(method, Method) else None  # includes the file of a user's own method
    return digest_of(version("jcrosslora"), settings, code, adapter.digest, adapter.config, source, target, texts)
