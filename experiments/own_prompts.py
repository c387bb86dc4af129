"""Print how far adapters know their prompts: the gain of sampled prompts at each place where prompts may begin.

    python experiments/own_prompts.py --base BASE ADAPTER [ADAPTER ...] [--show 3]

The gains are those of the sampled prompts and of the adapter's answers in their place. It knows its prompts where the
first is at least `jcrosslora.distill.own_prompts.KNOWN` and above the second. Places where the first samples gain less
than `KNOWN`, or where few are whole prompts, have no row. Adapters of both kinds are made by `jcrosslora train --loss
all` and `--loss answers`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.decoder import fast_dtype, load_model
from jcrosslora.distill.own_prompts import pilots
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.text.reading import tokenizer_of


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="so many prompts of each place")
    arguments = parser.parse_args(given)
    base, console = jcl.open_base(arguments.base), Console()
    model = load_model(base, fast_dtype())
    table = Table("adapter", "prompts begin at", "gain, nats a token", "of answers", "known", "seconds")
    for path in arguments.adapters:
        adapter = jcl.load_adapter(path, base)
        tokenizer = tokenizer_of(base, adapter.info.chat_template)
        begun = time.monotonic()
        source, key = DecoderSource.of(base, adapter, model=model, tokenizer=tokenizer), jax.random.key(arguments.seed)
        found = pilots(source, key)
        seconds = f"{time.monotonic() - begun:.0f}"
        for one in sorted(found, key=lambda one: -one.margin):
            figures = (f"{one.gain:.2f}", f"{one.answer_gain:.2f}", "yes" if one.known else "no")
            table.add_row(Path(path).name, one.name, *figures, seconds)
            for draft in one.drafts[: arguments.show]:
                console.print(f"  {one.name}: {draft.text[:200]!r}", markup=False)
    console.print(table)


if __name__ == "__main__":
    main()
