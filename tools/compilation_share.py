"""Share of compilation in a first and a second run of a command.

    python tools/compilation_share.py transfer ADAPTER --source SOURCE --target TARGET --method cross-lora --out OUT
    python tools/compilation_share.py evaluate --base BASE --data TASK.jsonl

Any command of `jcrosslora` is run twice, each time in a new process: first with an empty cache folder, then with what
the first has left there. `--out OUT` is replaced by a folder that is removed. For each run it prints its seconds, how
many of them JAX traced, lowered and compiled, and how many programs were compiled and found in the cache.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

RUN = """
import json, sys
import jax
from jcrosslora.cli.main import main

seconds, programs = [], {"asked": 0, "found": 0}
names = {"/jax/compilation_cache/compile_requests_use_cache": "asked", "/jax/compilation_cache/cache_hits": "found"}

def timed(name, taken, **_):
    if name.startswith("/jax/core/compile/"):
        seconds.append(taken)

def counted(name, **_):
    if name in names:
        programs[names[name]] += 1

jax.monitoring.register_event_duration_secs_listener(timed)
jax.monitoring.register_event_listener(counted)
record, sys.argv = sys.argv[1], ["jcrosslora", *sys.argv[2:]]
try:
    main()
finally:
    with open(record, "w") as file:
        json.dump({"seconds": sum(seconds), **programs}, file)
"""


def measure(arguments: Sequence[str], cache: Path) -> dict[str, float]:
    """Run a command in a new process: its seconds, those of compilation, and programs asked for and found in a cache.

    Raises:
        CalledProcessError: the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        record, given = Path(folder) / "record.json", list(arguments)
        if "--out" in given:
            given[given.index("--out") + 1] = str(Path(folder) / "out")
        environment = {**os.environ, "JCROSSLORA_CACHE": str(cache)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would be used instead
        begun = time.perf_counter()
        command = [sys.executable, "-c", RUN, str(record), *given]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return {"whole": time.perf_counter() - begun, **json.loads(record.read_text(encoding="utf-8"))}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first", "second"):
            found = measure(sys.argv[1:], Path(cache))
            share, compiled = found["seconds"] / found["whole"], found["asked"] - found["found"]
            print(
                f"{name:6} {found['whole']:7.1f} s, of compilation {found['seconds']:6.1f} s ({share:.0%}); "
                f"programs compiled {compiled:.0f}, found in the cache {found['found']:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
