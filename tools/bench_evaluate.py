"""Time `jcrosslora evaluate` of two checkouts on one file, and compare what they print.

    python tools/bench_evaluate.py BASE DATA ADAPTER [ADAPTER ...] --before CHECKOUT [--after CHECKOUT] [--limit 100]
        [--repeats 1] [--core 0]

Both run as commands on one core, in turn, with a folder of kept programs each, which is empty at the first run. Prints
wall time and processor time of each run, the ratio of the medians, how many of the answers differ, and the largest
difference of a figure. Processor time means something on a busy machine, wall time does not.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parents[1]


def run(checkout: Path, arguments: argparse.Namespace, cache: str) -> tuple[float, float, dict[str, Any]]:
    """Run the command once; return wall and processor seconds, and what it prints."""
    command = [sys.executable, "-m", "jcrosslora", "evaluate", "--base", arguments.base, "--data", arguments.data]
    command += [part for one in arguments.adapters for part in ("--adapter", one)]
    command += ["--limit", str(arguments.limit), "--show", str(arguments.limit), "--json"]
    own = os.environ | {"PYTHONPATH": str(checkout), "JAX_COMPILATION_CACHE_DIR": cache}
    pinned = ["taskset", "-c", str(arguments.core), *command]
    used, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    found = subprocess.run(pinned, env=own, cwd=cache, stdout=subprocess.PIPE, check=True)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime, json.loads(found.stdout)


def numbers(found: Any, path: str = "") -> dict[str, float]:
    """All numbers of a tree, by path."""
    if isinstance(found, dict | list):
        items = found.items() if isinstance(found, dict) else enumerate(found)
        return {key: value for name, one in items for key, value in numbers(one, f"{path}/{name}").items()}
    return {path: float(found)} if isinstance(found, int | float) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, default=HERE)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--core", type=int, default=0)
    arguments = parser.parse_args()
    taken: dict[str, list[float]] = {"before": [], "after": []}
    printed: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for _ in range(arguments.repeats):
            for name, cache in (("before", first), ("after", second)):
                wall, used, printed[name] = run(getattr(arguments, name).resolve(), arguments, cache)
                taken[name].append(used)
                print(f"{name}: {wall:.1f} s, {used:.1f} s of processor time", flush=True)
    print(f"ratio of processor time: {median(taken['after']) / median(taken['before']):.2f}")
    answers = [json.dumps(printed[name].pop("answers")) for name in taken]
    texts = [[one for one in json.loads(each)] for each in answers]
    print(
        f"{sum(one != other for one, other in zip(*texts, strict=True))} of {len(texts[0])} examples differ in answers"
    )
    before, after = (numbers(printed[name]) for name in taken)
    worst = max(before, key=lambda path: abs(before[path] - after[path]))
    print(f"largest difference of a figure: {abs(before[worst] - after[worst]):.1e}, at {worst}")


if __name__ == "__main__":
    main()
