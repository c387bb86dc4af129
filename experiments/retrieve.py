"""Which adapter of a shelf is found for a prompt: top-1 and top-3 of every retriever, and false positives.

    python experiments/retrieve.py SHELF --base BASE --task TASK --task TASK ... --unrelated FILE

makes a shelf of adapters that were trained or moved for tasks, and searches it for test prompts of these tasks. A task
is NAME:TRAIN:TEST:ADAPTER[:ADAPTER...], the files as JSONL of conversations, of prompts with answers or of questions
with choices. The adapters' samples are prompts of TRAIN, 32 evenly spread; nothing else of the tasks is used, no label
and no answer. Unrelated prompts come from other files. The figures have 95% intervals over prompts, by the bootstrap.
"""

import argparse
import json
import time
from pathlib import Path

from jcrosslora import Shelf
from jcrosslora.evaluate import read_examples
from jcrosslora.evaluate.bootstrap import Interval
from jcrosslora.shelf import SAMPLES, Accuracy, ProbeSettings, accuracy
from jcrosslora.text import Prompt
from jcrosslora.text.completion import message_entries
from jcrosslora.utils.picking import from_start
from jcrosslora.utils.progress import show_progress

WAYS = ("text", "tfidf", "weights")


def prompts_of(path: str, count: int) -> list[Prompt]:
    return list(from_start([example.prompt for example in read_examples(path)], count))


def add(shelf: Shelf, name: str, train: str, adapters: list[str], work: Path) -> list[str]:
    """Put the adapters of a task on the shelf, with prompts of its training file as samples."""
    lines = []
    for prompt in prompts_of(train, SAMPLES):
        lines.append({"prompt": prompt} if isinstance(prompt, str) else {"messages": message_entries(prompt)})
    file = work / f"{name}.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    found = shelf.add(adapters, prompts=file)
    if found.refused:
        raise SystemExit(f"{found.refused[0].place}: {found.refused[0].reason}")
    return [*found.added, *found.kept]


def shown(value: Interval | None) -> str:
    return "-" if value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def row(by: str, found: Accuracy, seconds: float) -> str:
    figures = map(shown, (found.top1, found.top3, found.answered, found.false))
    return f"| {by} | {' | '.join(figures)} | {seconds:.0f} |"


def main() -> None:
    show_progress()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shelf", type=Path, help="a new folder")
    parser.add_argument("--base", required=True)
    parser.add_argument("--task", action="append", required=True, metavar="NAME:TRAIN:TEST:ADAPTER")
    parser.add_argument("--unrelated", action="append", default=[], metavar="FILE")
    parser.add_argument("--prompts", type=int, default=100, help="of each file")
    parser.add_argument("--steps", type=int, default=300, help="of the weight probes' training")
    parser.add_argument("--by", nargs="+", default=WAYS, choices=WAYS)
    arguments = parser.parse_args()
    shelf, labelled = Shelf(arguments.shelf, arguments.base), []
    for task in arguments.task:
        name, train, test, *adapters = task.split(":")
        names = add(shelf, name, train, adapters, arguments.shelf)
        labelled += [(prompt, tuple(names)) for prompt in prompts_of(test, arguments.prompts)]
    labelled += [(prompt, ()) for file in arguments.unrelated for prompt in prompts_of(file, arguments.prompts)]
    prompts, wanted = [prompt for prompt, _ in labelled], [names for _, names in labelled]
    print(f"{len(shelf)} adapters, {sum(map(bool, wanted))} prompts of their tasks, {wanted.count(())} unrelated ones")
    print(
        "| by | top-1 | top-3 | answered by a right one | adapter for unrelated | seconds |\n|---|---|---|---|---|---|"
    )
    for by in arguments.by:
        begun = time.monotonic()
        if by == "weights":
            shelf.train_probes(ProbeSettings(steps=arguments.steps))
        found = accuracy(shelf.search(prompts, by), wanted)
        print(row(by, found, time.monotonic() - begun), flush=True)


if __name__ == "__main__":
    main()
