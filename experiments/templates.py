"""Print which prompt templates `distill` takes an adapter to know.

    python experiments/templates.py --base BASE --adapter ADAPTER [--adapter ...] [--each 6] [--seed 0]

The base writes prompts in every template and answers them with the adapter. These completions are put into one template
after the other. The table has, as means over completions with standard errors: the divergence of the predictions with
the adapter from those without, over the answers ("change"); the NLL of the answers under the base alone ("base NLL");
by how much the difference of the two is below that of the best template, on the same completions; and which templates
are taken. On 2 cores about a minute for each adapter of SmolLM2-135M.
"""

import argparse
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import fast_dtype, load_model
from jcrosslora.distill.completions import PILOT, TEMPLATE_TOKENS, write_pilot
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.templates import Sampler, behind_best, judge_templates, known_templates, templates_of


def run(arguments: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    base = jcl.open_base(arguments.base)
    model, tokenizer = load_model(base, fast_dtype()), load_tokenizer(base)
    for ref in arguments.adapter:
        generator = DecoderSource.of(base, jcl.load_adapter(ref, base), model=model, tokenizer=tokenizer)
        completions = write_pilot(generator, Sampler(seed=arguments.seed), arguments.each)
        if not completions:
            msg = f"{base.ref} with {ref} wrote no completions: give a larger --each than {arguments.each}"
            raise jcl.MethodError(msg)
        templates = templates_of(tokenizer)
        figures = judge_templates(generator, completions, TEMPLATE_TOKENS)
        known, columns = known_templates(templates, *figures), (*figures, behind_best(*figures))
        headers = "template", "change, nats", "base NLL, nats", "less than best", "taken"
        table = Table(*headers, title=ref, title_justify="left")
        for place, template in enumerate(templates):
            cells = [f"{x[place].mean():.2f} ± {x[place].std() / np.sqrt(x.shape[1]):.2f}" for x in columns]
            table.add_row(template.name, *cells, "yes" if template in known else "")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="that the adapters were trained on")
    parser.add_argument("--adapter", action="append", required=True)
    parser.add_argument("--each", type=int, default=PILOT, help="prompts of each template")
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args())
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"templates: {error}")


if __name__ == "__main__":
    main()
