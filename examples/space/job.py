"""Run a job in a process of its own, so that it can be stopped at any point, and its memory and files go with it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path

_WORKER = Path(__file__).with_name("worker.py")
_LOG = "log.txt"
_PREFIX = "jcrosslora: "
_USER_ERROR = 2
_OPENING = {"plan": "reading the files and timing a layer of each base", "move": "reading the files"}
_POLL = 0.5  # seconds between two looks at a job
_SHOWN = 500  # characters of a line


class JobError(Exception):
    """A job ended without a result; the message is one line for the visitor."""


async def run_job(what: str, folder: Path, *, minutes: float, local: bool) -> AsyncGenerator[str]:
    """Run "plan" or "move" in the folder of a job, which holds its settings; its files are there at the end.

    If the generator is closed, or its task is cancelled, the process is killed with all that it started.

    Args:
        what: the job, see worker.py.
        folder: of the job.
        minutes: after which it is stopped.
        local: whether it may use this machine's cache of the hub, and its token.

    Yields:
        What it is doing, twice a second.

    Raises:
        JobError: it failed, took too long, or was killed.
    """
    log, began = folder / _LOG, time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, str(_WORKER), what],
            cwd=folder,
            env=_environment(folder, local=local),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            took = time.monotonic() - began
            if took > 60 * minutes:
                msg = f"stopped after {minutes:g} minutes, which is the most here: choose smaller bases or fewer "
                raise JobError(msg + "completions, or run jcrosslora on a machine of your own")
            yield _told(log) or f"{_OPENING[what]}, {took:.0f} s so far"
            await asyncio.sleep(_POLL)
    finally:
        _end(process)
    if process.returncode:
        raise JobError(_why(process.returncode, log))


def _environment(folder: Path, *, local: bool) -> dict[str, str]:
    """Return the environment of a job. A visitor's has no token: it must not read what only the owner may."""
    own = dict(os.environ)
    if not local:
        own = {
            name: value
            for name, value in own.items()
            if name == "HF_ENDPOINT" or not (name.startswith(("HF_", "HUGGING")) or "TOKEN" in name or "KEY" in name)
        }
        own |= {"HF_HOME": str(folder / "hub")}
    return own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _told(log: Path) -> str:
    """Return the last thing that a job has told of itself; "" before the first."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line.removeprefix(_PREFIX) for line in lines if line.startswith(_PREFIX)]
    return told[-1][:_SHOWN] if told else ""


def _why(code: int, log: Path) -> str:
    if code == _USER_ERROR and (told := _told(log)):
        return told
    # A defect, or too little memory: the operator finds the whole of it in the log of the page.
    print(log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
    if code == -signal.SIGKILL:
        return "the system ended the job, most likely for lack of memory: choose smaller bases"
    return f"the job failed with exit code {code}, which is a defect: please report it with what you entered"
