"""Which layouts of prompt and answer does `anchored` take an adapter to know?

    python experiments/layouts.py --base BASE --adapter ADAPTER [--adapter ...] [--each 48] [--seed 0]

The base writes prompts in every layout and answers them with the adapter. Printed are, with their standard errors, the
divergence of its predictions with the adapter from those without where answers begin, and by how much the entropy of
its predictions falls over the answers; and which layouts `jcrosslora.refine.writing.known_layouts` takes. On 2 cores
about 4 minutes for each adapter of SmolLM2-135M.
"""

import argparse
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.decoder import load_params, settings_of, stack_adapter
from jcrosslora.refine.dialogues import LAYOUTS, Writer, answer, write_prompts
from jcrosslora.refine.settings import FitSettings
from jcrosslora.refine.writing import by_layout, compare, known_layouts
from jcrosslora.tokens import load_tokenizer


def run(arguments: argparse.Namespace) -> None:
    console, tokens = Console(width=None if sys.stdout.isatty() else 120), FitSettings().tokens
    base = jcl.open_base(arguments.base)
    settings, params, tokenizer = settings_of(base), load_params(base), load_tokenizer(base)
    for ref in arguments.adapter:
        adapter = stack_adapter(jcl.load_adapter(ref, base), base)
        writer = Writer(settings, params, tokenizer, adapter, name=base.ref)
        wanted = [layout for layout in range(len(LAYOUTS)) for _ in range(arguments.each)]
        dialogues = answer(writer, write_prompts(writer, wanted, arguments.seed), arguments.seed, length=tokens)
        change, surer = (by_layout(dialogues, values) for values in compare(writer, dialogues, tokens))
        known = known_layouts(change, surer)
        table = Table("layout", "dialogues", "change, nats", "surer by, nats", "taken", title=ref, title_justify="left")
        for layout, values in change.items():
            figures = [f"{x.mean():.2f} ± {x.std() / np.sqrt(len(x)):.2f}" for x in (values, surer[layout])]
            table.add_row(LAYOUTS[layout][0].strip(), str(len(values)), *figures, "yes" if layout in known else "")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="that the adapters were trained on")
    parser.add_argument("--adapter", action="append", required=True)
    parser.add_argument("--each", type=int, default=48, help="prompts of each layout")
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args())
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"layouts: {error}")


if __name__ == "__main__":
    main()
