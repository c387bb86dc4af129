"""Print what `distill` finds out about an adapter without data, and how many of its answers are of the wanted kind.

    python experiments/discovery.py --base BASE --adapter ADAPTER [--adapter ...] [--target TARGET]
        [--expect json:intent] [--seed 0]

For each step of the search (`jcrosslora.distill.task_search`) the table has: how many texts there are; their mean
score; the share that is as expected, and how many different ones are among these; and the mean scores of those that
are, and that are not. Below it stand the best of each step, and then figures of the completions that a fit would use.
With `--target` that base writes the requests if it is the better writer, as in a move to it. `--expect` is `json` (an
object), `json:KEY` (an object with this key, by whose values objects differ) or a regular expression that an answer has
to match (by whose first group, if any, they differ). On 2 cores two to three minutes for each adapter of SmolLM2-135M.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import fast_dtype, load_model
from jcrosslora.distill.completions import write_completions
from jcrosslora.distill.settings import USUAL, DistillSettings
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.task_search import NOTHING, choose_writer
from jcrosslora.distill.task_search.answers import ScoredAnswer
from jcrosslora.distill.templates import Sampler
from jcrosslora.report.fit import fit_sentences
from jcrosslora.text import Completion
from jcrosslora.text.completion import prompt_text

Judge = Callable[[str], str | None]  # what kind of expected answer a text is; None if it is none


def judge_of(expected: str) -> Judge:
    """Make the judge of `--expect`."""
    if expected == "json" or expected.startswith("json:"):
        key = expected.partition(":")[2]

        def read(text: str) -> str | None:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                return None
            if not isinstance(value, dict) or (key and key not in value):
                return None
            return str(value[key]) if key else " ".join(value)

        return read
    pattern = re.compile(expected)

    def match(text: str) -> str | None:
        found = pattern.search(text)
        return None if found is None else found[1] if pattern.groups else found[0]

    return match


def row(name: str, items: Sequence[Completion], scores: Sequence[float], judge: Judge) -> list[str]:
    """Make the figures of one step."""
    kinds = [judge(item.answer.strip()) for item in items]
    right = np.array([kind is not None for kind in kinds], bool)
    figures = np.array(scores, float) if len(scores) else np.full(len(items), np.nan)

    def mean(chosen: np.ndarray) -> str:
        return f"{figures[chosen].mean():.2f}" if chosen.any() else ""

    share = f"{right.mean():.0%}" if len(right) else ""
    different = str(len(set(kinds) - {None}))
    return [name, str(len(items)), mean(right | ~right), share, different, mean(right), mean(~right)]


def run(arguments: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    base, judge = jcl.open_base(arguments.base), judge_of(arguments.expect)
    model, tokenizer = load_model(base, fast_dtype()), load_tokenizer(base)
    sampler = Sampler(arguments.completions, seed=arguments.seed)
    target = None if arguments.target is None else DecoderSource.of(jcl.open_base(arguments.target))
    for ref in arguments.adapter:
        generator = DecoderSource.of(base, jcl.load_adapter(ref, base), model=model, tokenizer=tokenizer)
        begun = time.monotonic(), time.process_time()
        writer = generator.alone() if target is None else choose_writer(generator, target)
        found = write_completions(generator, writer, sampler, arguments.discovery)
        wall, busy = time.monotonic() - begun[0], time.process_time() - begun[1]
        task = found.task or NOTHING
        headers = "step", "texts", "score", "as expected", "different", "score of these", "of others"
        table = Table(*headers, title=ref, title_justify="left")
        table.add_row(*row("amplified", task.said, [], judge))
        for name in ("guessed", "further", "examples"):
            part: list[ScoredAnswer] = getattr(task, name)
            table.add_row(*row(name, [one.item for one in part], [one.score for one in part], judge))
        for origin in dict.fromkeys(item.origin for item in found.items):
            table.add_row(*row(origin, [item for item in found.items if item.origin == origin], [], judge))
        table.add_row(*row("all completions", found.items, [], judge))
        console.print(table)
        print(f"requests are written by {writer.name}")
        print(f"{next(fit_sentences(found.facts))}; {wall:.0f} s, of processors {busy:.0f} s")
        where = ", ".join(template.name for template in task.templates)
        print(f"share of requests found: {task.share:.2f}, in {where}; explained: {task.explained:.2f}")
        topics = Counter(task.about.values()).most_common(arguments.show)
        print("requests were about: " + "; ".join(f"{topic or 'nothing'} ({count})" for topic, count in topics))
        print("kinds of jobs: " + ", ".join(f"{kind.name} {mean:.2f}" for kind, mean in task.kinds))
        for item in task.said[: arguments.show]:
            print(f"  says {item.answer!r}")
        for name in ("guessed", "further", "examples"):
            for one in getattr(task, name)[: arguments.show]:
                print(f"  {name} {one.score:.2f} {one.text!r} in {one.template.name}: {one.item.answer[:120]!r}")
        for item in found.items[: arguments.show]:
            print(f"  completion {prompt_text(item.prompt)!r}: {item.answer[:120]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="that the adapters were trained on")
    parser.add_argument("--adapter", action="append", required=True)
    parser.add_argument("--target", help="base that adapters are moved to")
    parser.add_argument("--expect", default="json", help="json, json:KEY or a regular expression")
    parser.add_argument("--completions", type=int, default=USUAL)
    parser.add_argument("--discovery", type=int, default=DistillSettings.discovery, help="texts of each step")
    parser.add_argument("--show", type=int, default=10, help="of each step, the best ones")
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args())
    except (jcl.JCrossLoRAError, OSError, re.error) as error:
        sys.exit(f"discovery: {error}")


if __name__ == "__main__":
    main()
