"""Which layouts of prompt and answer does `anchored` take an adapter to know?

    python experiments/layouts.py --base BASE --adapter ADAPTER [--adapter ...] [--each 16] [--seed 0]

The base writes prompts in every layout and answers them with the adapter, and these dialogues are put into one layout
after the other. Printed are, in the mean over dialogues and with its standard error, the divergence of its predictions
with the adapter from those without where answers begin; by how much the entropy of its predictions falls over the
answers; and by how much less the sum of both (`jcrosslora.refine.writing.layout_scores`) is than that of the best
layout, in the same dialogues; and which layouts are taken. On 2 cores about a minute for each adapter of SmolLM2-135M.
"""

import argparse
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.decoder import fast_dtype, load_params, settings_of, stack_adapter
from jcrosslora.refine.dialogues import LAYOUTS, Writer
from jcrosslora.refine.settings import FitSettings
from jcrosslora.refine.writing import PILOT, judge_layouts, known_layouts, layout_scores, write_pilot
from jcrosslora.tokens import load_tokenizer


def run(arguments: argparse.Namespace) -> None:
    console, fit = Console(width=None if sys.stdout.isatty() else 120), FitSettings()
    base = jcl.open_base(arguments.base)
    settings, params, tokenizer = settings_of(base), load_params(base, fast_dtype()), load_tokenizer(base)
    for ref in arguments.adapter:
        adapter = stack_adapter(jcl.load_adapter(ref, base), base)
        writer = Writer(settings, params, tokenizer, adapter, name=base.ref)
        change, surer = judge_layouts(writer, write_pilot(writer, fit, arguments.seed, arguments.each), fit.tokens)
        known, scores = known_layouts(change, surer), layout_scores(change, surer)
        behind = scores[scores.mean(axis=1).argmax()] - scores
        table = Table("layout", "change, nats", "surer by, nats", "less than best", "taken")
        for layout, (front, _) in enumerate(LAYOUTS):
            cells = [f"{x.mean():.2f} ± {x.std() / np.sqrt(len(x)):.2f}" for x in (change[layout], surer[layout])]
            cells.append(f"{behind[layout].mean():.2f} ± {behind[layout].std() / np.sqrt(len(behind[layout])):.2f}")
            table.add_row(front.strip(), *cells, "yes" if layout in known else "")
        table.title, table.title_justify = ref, "left"
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="that the adapters were trained on")
    parser.add_argument("--adapter", action="append", required=True)
    parser.add_argument("--each", type=int, default=PILOT, help="prompts of each layout")
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args())
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"layouts: {error}")


if __name__ == "__main__":
    main()
