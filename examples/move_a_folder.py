"""Move every adapter of a folder to several base models by one plan.

    python examples/move_a_folder.py ADAPTERS SOURCE TARGET [TARGET ...] --out moved

The plan is written to OUT/plan.toml, so that `jcrosslora batch OUT/plan.toml` does the same. Each pair of bases is
aligned once for all adapters. What is done is not done again: run the command once more after a stop, or after adding
an adapter.
"""

import argparse
import json
from pathlib import Path

import jcrosslora as jcl


def plan_text(adapters: Path, source: str, targets: list[str], method: str) -> str:
    """Write a plan; paths in it are relative to its own folder, so absolute ones are used here."""

    def ref(base: str) -> str:
        path = Path(base)
        return json.dumps(str(path.resolve()) if path.exists() else base)

    names = {f"target{number}": target for number, target in enumerate(targets, 1)}
    lines = ['out = "adapters"', "", "[bases]", f"source = {ref(source)}"]
    lines += [f"{name} = {ref(target)}" for name, target in names.items()]
    lines += ["", "[adapters]", f"source = [{json.dumps(str(adapters.resolve() / '*'))}]"]
    lines += [
        "",
        "[[moves]]",
        'from = "source"',
        f"to = {json.dumps(list(names))}",
        f"methods = [{json.dumps(method)}]",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, write the plan, run it, and print the outcome of every job."""
    jcl.show_progress()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, help="a folder of adapters, all of one base")
    parser.add_argument("source", help="the base they were trained on")
    parser.add_argument("targets", nargs="+", help="the bases to move them to")
    parser.add_argument("--out", type=Path, default=Path("moved"), help="the folder to write")
    parser.add_argument("--method", default="auto", help="see `jcrosslora methods`")
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    plan = arguments.out / "plan.toml"
    plan.write_text(plan_text(arguments.adapters, arguments.source, arguments.targets, arguments.method))

    summary = jcl.run_batch(jcl.read_plan(plan))
    for outcome in summary.outcomes.values():
        print(f"{outcome.status:6} {outcome.name}: {outcome.text}")


if __name__ == "__main__":
    main()
