"""Ask whether a better answer than the source's likeliest one can be chosen without labels.

    python experiments/candidates.py --source SOURCE --target TARGET --adapter ADAPTER --student STUDENT
        --data train.jsonl --work WORK [--prompts 200] [--samples 4] [--temperature 0.7] [--keep both --share 0.75]

The last prompts of the file, which have right answers, are answered by the source with ADAPTER, greedily and several
times at a temperature, and greedily by the target with STUDENT, an adapter that was moved with these prompts. The table
says how often the right answer is among the candidates, how often each rule chooses it, and how often it does in the
half of the prompts that the rule is surest of:

    source          the source's greedy answer
    student         the student's greedy answer
    majority        the one that the source gives most often, its greedy answer counted half more
    by source       the one with the highest log-probability under the source
    by student      the same under the student
    both            the highest sum of both

`--keep RULE` writes what a rule chooses to WORK as completions that `fits.py --work WORK` fits to, for the `--share` of
prompts that it is surest of. Data must be training data: choices are made by it.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fits import MOST, save_completions
from rich.console import Console
from rich.table import Table
from scripts import as_command, score_answers, wide_console

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import fast_dtype, load_model, stack_adapter
from jcrosslora.distill.settings import USUAL
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.templates import Sampler
from jcrosslora.text import Completion
from jcrosslora.training import read_examples
from jcrosslora.training.batches import as_completion, encode

_GREEDY_COUNTS = 1.5  # answers, in a majority


class Candidate(NamedTuple):
    """An answer to a prompt: how often the source gave it, and its log-probabilities under source and student."""

    text: str
    votes: float
    by_source: float
    by_student: float

    @property
    def by_both(self) -> float:
        """The sum of both log-probabilities."""
        return self.by_source + self.by_student


class Asked(NamedTuple):
    """A prompt with its right answer, the greedy answers of source and student, and the answers that ended."""

    right: Completion
    greedy: tuple[str, str]
    candidates: list[Candidate]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "target", "adapter", "student"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4, help="answers that the source samples to each prompt")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--keep", choices=RULES, help="rule whose choice is written to WORK")
    parser.add_argument("--share", type=float, default=1.0, help="of the prompts that are written")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def ask(arguments: argparse.Namespace) -> list[Asked]:
    """Answer the prompts, and score each answer under both models."""
    known = [as_completion(one) for one in read_examples(arguments.data)][-arguments.prompts :]
    prompts, sides = [Completion(one.prompt) for one in known], []
    for ref, path in ((arguments.source, arguments.adapter), (arguments.target, arguments.student)):
        base = jcl.open_base(ref)
        adapter, model, tokenizer = jcl.load_adapter(path, base), load_model(base, fast_dtype()), load_tokenizer(base)
        writer = DecoderSource.of(base, adapter, model=model, tokenizer=tokenizer)
        sides.append((writer, model, stack_adapter(adapter, base)))
    likeliest = Sampler(tokens=MOST, temperature=0.0)
    greedy = [likeliest.answer(writer, prompts) for writer, _, _ in sides]
    sampler = Sampler(tokens=MOST, temperature=arguments.temperature, seed=arguments.seed)
    drawn = sampler.answer(sides[0][0], prompts * arguments.samples)
    votes: list[Counter[str]] = []
    for place, (by_source, by_student) in enumerate(zip(*greedy, strict=True)):
        given = [one for one in drawn[place :: len(prompts)] if one.ended]
        votes.append(Counter(one.answer for one in given))
        votes[-1][by_source.answer] += _GREEDY_COUNTS * by_source.ended  # type: ignore[assignment]
        votes[-1][by_student.answer] += 0
    items = [
        Completion(one.prompt, text, ended=True) for one, found in zip(prompts, votes, strict=True) for text in found
    ]
    scores = [
        score_answers(model, update, [encode(writer.tokenizer, one) for one in items])[0].tolist()
        for writer, model, update in sides
    ]
    figures, asked = zip(*scores, strict=True), []
    for place, (right, found) in enumerate(zip(known, votes, strict=True)):
        candidates = [Candidate(text, count, *next(figures)) for text, count in found.items()]
        asked.append(Asked(right, (greedy[0][place].answer, greedy[1][place].answer), candidates))
    return asked


def highest(key: Callable[[Candidate], float]) -> Callable[[Asked], Candidate]:
    """Choose the candidate with the highest figure."""
    return lambda one: max(one.candidates, key=key)


def likeliest_of(side: int) -> Callable[[Asked], Candidate]:
    """Choose the greedy answer of the source (0) or the student (1)."""
    return lambda one: next(found for found in one.candidates if found.text == one.greedy[side])


RULES: dict[str, tuple[Callable[[Asked], Candidate], Callable[[Candidate], float]]] = {
    "source": (likeliest_of(0), lambda found: found.by_source),
    "student": (likeliest_of(1), lambda found: found.by_student),
    "majority": (highest(lambda found: found.votes), lambda found: found.votes),
    "by source": (highest(lambda found: found.by_source), lambda found: found.by_source),
    "by student": (highest(lambda found: found.by_student), lambda found: found.by_student),
    "both": (
        highest(lambda found: found.by_source + found.by_student),
        lambda found: found.by_source + found.by_student,
    ),
}


def run(arguments: argparse.Namespace, console: Console) -> None:
    asked, table = ask(arguments), Table("rule", "right", "right in the surer half")
    among = sum(any(found.text == one.right.answer for found in one.candidates) for one in asked) / len(asked)
    console.print(f"the right answer is among {sum(len(one.candidates) for one in asked)} candidates to {among:.3f}")
    for name, (choose, certainty) in RULES.items():
        chosen = sorted(((choose(one), one.right) for one in asked), key=lambda pair: -certainty(pair[0]))
        hits = [found.text == right.answer for found, right in chosen]
        half = hits[: len(hits) // 2]
        table.add_row(name, f"{sum(hits) / len(hits):.3f}", f"{sum(half) / len(half):.3f}")
        if name == arguments.keep:
            kept = chosen[: round(arguments.share * len(chosen))]
            items = [dataclasses.replace(right, answer=found.text, ended=True, greedy=True) for found, right in kept]
            file = f"completions-{USUAL}-{arguments.prompts}-{arguments.seed}-0.jsonl"
            save_completions(arguments.work / file, items)
    console.print(table)


def main() -> None:
    with as_command():
        run(parse(), wide_console())


if __name__ == "__main__":
    main()
