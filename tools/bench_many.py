"""What a batch takes to fit 1, 2, 4 and 8 adapters of one pair of bases: seconds of processor time, each in a process.

    python tools/bench_many.py SOURCE TARGET ADAPTER... [--counts 1 2 4 8] [--completions 32] [--prompts FILE]
        [--effect auto]

ADAPTERs are of SOURCE; they are taken in turn until there are enough, and one that is taken twice is fitted twice.
Nothing is cached, so each process compiles its programs. "of the first" is the time over that of the first count, and
"each more" what an adapter beyond the first count takes. Processor time is that of all threads: two cores that do
nothing else take at best half of it.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

_CHILD = """
import sys, time
import jcrosslora as jcl
summary = jcl.run_batch(jcl.read_plan(sys.argv[1]))
failed = [f"{one.name}: {one.text}" for one in summary.outcomes.values() if one.status != "done"]
print("; ".join(failed) or time.process_time())
sys.exit(bool(failed))
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--completions", type=int, default=32)
    parser.add_argument("--prompts", help="file of prompts for transfer; without it the source writes them")
    parser.add_argument("--effect", choices=("auto", "never"), default="auto")
    found = parser.parse_args()
    if min(found.counts) < 1:
        sys.exit("bench_many: all counts have to be 1 or more")
    return found


def write_plan(folder: Path, count: int, arguments: argparse.Namespace) -> Path:
    """Write the plan of a batch, with a link for each adapter."""
    places = folder / "adapters"
    places.mkdir()
    for number in range(count):
        place = Path(arguments.adapters[number % len(arguments.adapters)]).expanduser().absolute()
        (places / f"a{number:02}").symlink_to(place)
    bases = {name: str(Path(getattr(arguments, name)).expanduser().absolute()) for name in ("source", "target")}
    texts = "" if arguments.prompts is None else f'prompts = "{Path(arguments.prompts).absolute()}"\n'
    plan = folder / "plan.toml"
    plan.write_text(
        'out = "moved"\n'
        f'[bases]\nsource = "{bases["source"]}"\ntarget = "{bases["target"]}"\n'
        '[adapters]\nsource = ["adapters/*"]\n'
        '[[moves]]\nfrom = "source"\nto = "target"\nmethods = "distill"\ncache = false\n'
        f'effect = "{arguments.effect}"\n'
        f"completions = {arguments.completions}\n{texts}",
        encoding="utf-8",
    )
    return plan


def seconds(count: int, arguments: argparse.Namespace) -> float:
    """Fit so many adapters in a process of their own; return its processor time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _CHILD, str(write_plan(Path(folder), count, arguments))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench_many: {(done.stdout.strip() or done.stderr.strip()).splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def main() -> None:
    arguments = parse()
    first: tuple[int, float] | None = None
    for count in arguments.counts:
        took = seconds(count, arguments)
        line = f"{count:3} adapters {took:8.1f} s"
        if first is None:
            first = count, took
        elif count > first[0]:
            line += f"{took / first[1]:6.2f} of the first, each more {(took - first[1]) / (count - first[0]):7.1f} s"
        print(line, flush=True)


if __name__ == "__main__":
    main()
