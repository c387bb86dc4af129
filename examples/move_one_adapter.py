"""Move one adapter to another base model, look at the result, and save it.

    python examples/move_one_adapter.py ADAPTER SOURCE TARGET --out moved

Each of the three is a folder, a GGUF file or a hub id. On two cores an adapter of a model of 135M parameters takes
about five minutes by the default method, of which most is text that the source writes.
"""

import argparse

import jcrosslora as jcl


def main() -> None:
    """Parse the command line, move, and print what to expect."""
    jcl.show_progress()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="the adapter to move")
    parser.add_argument("source", help="the base it was trained on")
    parser.add_argument("target", help="the base to move it to")
    parser.add_argument("--out", default="moved", help="the folder to write")
    parser.add_argument("--prompts", help="a file with prompts of the adapter's own task, one a line: more survives")
    parser.add_argument("--completions", type=int, default=300, help="texts that an update is fitted to")
    arguments = parser.parse_args()

    source, target = jcl.open_base(arguments.source), jcl.open_base(arguments.target)
    print(jcl.compare_bases(source, target).sentence)

    result = jcl.transfer(
        jcl.load_adapter(arguments.adapter, source),
        source,
        target,
        jcl.methods.Auto(completions=arguments.completions),
        prompts=arguments.prompts,
    )
    print(result.verdict.text)
    for text in result.texts[:3]:
        print("written by the source with its adapter:", repr(text))
    print("saved to", result.save(arguments.out, overwrite=True))


if __name__ == "__main__":
    main()
