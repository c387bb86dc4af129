"""Which templates of prompt and answer does `distill` take an adapter to know?

    python experiments/templates.py --base BASE --adapter ADAPTER [--adapter ...] [--each 6] [--seed 0]

The base writes prompts in every template and answers them with the adapter, and these completions are put into one template
after the other. Printed are, in the mean over completions and with its standard error, the divergence of its predictions
with the adapter from those without, over the answers; how base_nll these are to it without, as -log p; by how much less
the difference of both is than in the best template, in the same completions; and which templates are taken. On 2 cores about
a minute for each adapter of SmolLM2-135M.
"""

import argparse
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import fast_dtype, load_params, settings_of, stack_adapter
from jcrosslora.fit.distill.completions import TEMPLATES, Writer
from jcrosslora.fit.distill.settings import FitSettings
from jcrosslora.fit.distill.template_choice import PILOT, behind_best, judge_templates, known_templates, write_pilot


def run(arguments: argparse.Namespace) -> None:
    console, fit = Console(width=None if sys.stdout.isatty() else 120), FitSettings()
    base = jcl.open_base(arguments.base)
    settings, params, tokenizer = settings_of(base), load_params(base, fast_dtype()), load_tokenizer(base)
    for ref in arguments.adapter:
        adapter = stack_adapter(jcl.load_adapter(ref, base), base)
        writer = Writer(settings, params, tokenizer, adapter, name=base.ref, adapter_name=ref)
        completions = write_pilot(writer, fit, arguments.seed, arguments.each)
        if not completions:
            msg = f"{base.ref} with {ref} wrote no completions: give a larger --each than {arguments.each}"
            raise jcl.MethodError(msg)
        figures = judge_templates(writer, completions, fit.tokens)
        known, columns = known_templates(*figures), (*figures, behind_best(*figures))
        table = Table(
            "template", "change, nats", "base_nll, nats", "less than best", "taken", title=ref, title_justify="left"
        )
        for template, (front, _) in enumerate(TEMPLATES):
            cells = [f"{x[template].mean():.2f} ± {x[template].std() / np.sqrt(x.shape[1]):.2f}" for x in columns]
            table.add_row(front.strip(), *cells, "yes" if template in known else "")
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
