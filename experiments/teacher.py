"""Measure the teacher of `distill` itself on right answers: is the teacher or the fit the limit?

    python experiments/teacher.py --source SOURCE --target TARGET --adapter ADAPTER --data train.jsonl [--first 64]

For each mix of the adapted source, the target and the change that the adapter makes (`teacher_weight`, `sure_weight`,
`contrast_weight`), the table has the NLL of the right answers' tokens among the shared tokens, in nats a position, and
the share of positions where the right token is the likeliest one, of all positions and as whole answers. The adapted
source alone is the row "1, 1, 0", the target alone "0, 0, 0". Data must be training data: choices are made by it.
"""

import argparse
import sys

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import fast_dtype, load_model, stack_adapter
from jcrosslora.distill.batches import make_batches
from jcrosslora.distill.distillation import end_tokens
from jcrosslora.distill.output_columns import find_columns
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.distill.sources.decoder import DecoderReader, RestrictedModel
from jcrosslora.distill.teacher import Teacher, mix_teacher
from jcrosslora.training import read_examples
from jcrosslora.training.batches import as_completion

SHARES = [(w, w) for w in (0.0, 0.25, 0.5, 0.75, 1.0)] + [(w, 1.0) for w in (0.0, 0.25, 0.5, 0.75)]
MIXES = [(*shares, c) for shares in SHARES for c in (0.0, 0.25, 0.5, 1.0)]


def run(arguments: argparse.Namespace) -> None:
    source, target = jcl.open_base(arguments.source), jcl.open_base(arguments.target)
    adapter = jcl.load_adapter(arguments.adapter, source)
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    examples = read_examples(arguments.data)[arguments.skip :][: arguments.first]
    items = [as_completion(one) for one in examples]
    # One completion a call keeps track of whole answers; of few shapes all the same.
    batches = [make_batches([item], tokenizers, 0.0)[0] for item in items]
    columns = find_columns(source, target, batches, 6000, end_tokens(tokenizers, items))
    src, tgt = (
        RestrictedModel.of(load_model(base, fast_dtype()), columns.head_rows(side), len(columns.ends[side]))
        for side, base in enumerate((source, target))
    )
    stacked = stack_adapter(adapter, source)
    sums: dict[tuple[float, ...], list[tuple[float, int, int]]] = {mix: [] for mix in MIXES}
    column = {int(index): place for place, index in enumerate(np.concatenate([columns.shared[1], columns.own[1]]))}
    teacher = Teacher(DecoderReader(src.with_adapter(stacked)), tgt, columns, DistillSettings().teacher_weights(1.0))
    for batch in batches:
        found, base, adapted = teacher.sides(batch)
        rows = np.flatnonzero(batch.answer)
        # Behind the last token of an answer its end follows, which is the last column.
        wanted = np.array([column.get(int(token), base.shape[1] - 1) for token in batch.next_tgt[rows]])
        for mix in MIXES:
            taught = np.asarray(mix_teacher(found.teacher, base, adapted, *map(jnp.float32, mix)))
            right = taught[rows, wanted]
            hits = (taught[rows].max(axis=1) == right).sum()
            sums[mix].append((-float(right.sum()), int(hits), len(rows)))
    table = Table(
        "teacher weight",
        "sure weight",
        "contrast",
        "NLL",
        "right tokens",
        "right answers",
        title=f"{len(items)} examples",
    )
    for mix in MIXES:
        nll, hits, count = np.array(sums[mix], np.float64).T
        table.add_row(
            *map(str, mix),
            f"{nll.sum() / count.sum():.4f}",
            f"{hits.sum() / count.sum():.3f}",
            f"{(hits == count).mean():.3f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "target", "adapter", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--first", type=int, default=64, help="examples")
    parser.add_argument("--skip", type=int, default=0, help="examples in front of them that are left out")
    try:
        run(parser.parse_args())
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"teacher: {error}")


if __name__ == "__main__":
    main()
