"""Read very many damaged files with every reader, and count what came of it.

    python tools/fuzz_readers.py                    # 100,000 cases on each reader
    python tools/fuzz_readers.py --cases 1000 --only GGUF

A case is unclean if it ends in anything but a result or a one-line error of the package: another exception, a warning,
an allocation that the address space (2 GB above the start) does not hold, more than five seconds of processor time; or
if the process meanwhile opened a file outside the case's folder, started a process, opened a connection, unpickled or
compiled anything. The first of each kind is kept in --keep. Exit 1 if there were any.
"""

import argparse
import contextlib
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from jcrosslora.errors import JCrossLoRAError

SECONDS = 5  # of processor time, which nobody else's work lengthens, for one case, which takes a few milliseconds
SPARE = 2 << 30  # bytes of address space above what is mapped at the start
FORBIDDEN = (
    "subprocess.",
    "os.exec",
    "os.system",
    "os.posix_spawn",
    "socket.",
    "pickle.",
    "marshal.",
    "compile",
    "exec",
)


class Watch:
    """Notes what an audit hook hears while a case is read; hooks cannot be removed, so there is one."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.heard: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self.folder + os.sep):
                self.heard.append(f"open {path}")
        elif event.startswith(FORBIDDEN):
            self.heard.append(event)

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Listen while the block runs, in which files of `folder` may be opened."""
        self.folder, self.heard = os.path.realpath(folder), []
        try:
            yield
        finally:
            self.folder = None


def too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds of processor time")


def outcome(reader: Any, folder: Path, watch: Watch) -> str:
    """What became of a case: read, refused, or what is wrong."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with watch.over(folder):
            reader.read(folder)
        result = "read"
    except JCrossLoRAError as error:
        result = "refused" if len(str(error).splitlines()) == 1 else f"an error of several lines: {str(error)!r:.200}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        result = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:100]!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return f"forbidden: {watch.heard[0]}" if watch.heard else result


def fuzz(name: str, reader: Any, cases: int, seed: int, keep: Path, watch: Watch) -> Counter[str]:
    counts: Counter[str] = Counter()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as place:
        folder = Path(place)
        written: dict[str, bytes] = {}
        for case in range(cases):
            files = reader.damage(Random(f"{name} {seed} {case}"))
            for file in written.keys() - files.keys():
                (folder / file).unlink()
            for file, content in files.items():
                if written.get(file) is not content:
                    (folder / file).write_bytes(content)
            written = dict(files)
            result = outcome(reader, folder, watch)
            counts[result] += 1
            if result not in ("read", "refused") and counts[result] == 1:
                print(f"  case {case}: {result}", flush=True)
                shutil.copytree(folder, keep / f"{name.replace(' ', '-')}-{seed}-{case}", dirs_exist_ok=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Read very many damaged files with every reader.")
    parser.add_argument("--cases", type=int, default=100_000, help="on each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a reader; may be given several times")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz_readers", help="for bad cases")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    readers = importlib.import_module("hostile_files").READERS
    if unknown := sorted(set(given.only or ()) - readers.keys()):
        parser.error(f"--only {unknown[0]!r} is no reader; the readers are {', '.join(readers)}")
    warnings.simplefilter("error")  # What numpy warns of is not for users to see.
    watch = Watch()
    for reader in readers.values():  # Imports and first uses, before anything is watched.
        with tempfile.TemporaryDirectory() as place, contextlib.suppress(JCrossLoRAError):
            for file, content in reader.damage(Random(0)).items():
                (Path(place) / file).write_bytes(content)
            reader.read(Path(place))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + SPARE, mapped + SPARE))
    signal.signal(signal.SIGPROF, too_long)
    unclean = 0
    print("| reader | cases | read | refused | unclean | seconds | peak RSS, GB |\n|---|---|---|---|---|---|---|")
    for name in given.only or readers:
        start = time.monotonic()
        counts = fuzz(name, readers[name], given.cases, given.seed, given.keep, watch)
        bad = sum(counts.values()) - counts["read"] - counts["refused"]
        unclean += bad
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        took = time.monotonic() - start
        row = [name, given.cases, counts["read"], counts["refused"], bad, f"{took:.0f}", f"{peak:.2f}"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return 1 if unclean else 0


if __name__ == "__main__":
    sys.exit(main())
