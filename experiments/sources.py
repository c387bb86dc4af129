"""Compare sources of one adapter: our decoder, torch, and a server that tells the likeliest tokens alone.

All write greedy answers, without the adapter and with it. The demo's adapter of SmolLM2 is then moved to Gemma from our
decoder and from the server, by a short fit to these answers; so the fits differ by the predictions alone. (Those of
torch are whole, as our decoder's are.) Start a server of the source with its adapter first, such as llama.cpp's:

    jcrosslora export jcrosslora/data/smollm2_json_answers --base SmolLM2.gguf --out gguf --profile gguf
    llama-server -m SmolLM2.gguf --lora gguf/adapter.gguf --alias smollm2 --port 8080
    python experiments/sources.py --source SmolLM2.gguf --target gemma3.gguf --url http://127.0.0.1:8080/v1

On a free core it takes about 5 minutes.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jcrosslora as jcl
from jcrosslora.adapter import Adapter
from jcrosslora.decoder import load_model
from jcrosslora.distill.run import Distilled, distill
from jcrosslora.distill.sources import Source
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.sources.served import ServedSource
from jcrosslora.distill.sources.torch import TorchSource
from jcrosslora.methods import Distill
from jcrosslora.report.fit import fit_sentences
from jcrosslora.session.demo.run import SOURCE_ADAPTER, TARGET_ADAPTER, compare, demo_questions, shipped

TOKENS = 12  # of a greedy answer


def sources(arguments: argparse.Namespace, folder: str) -> Iterator[tuple[str, Source]]:
    base = jcl.open_base(arguments.source)
    model = load_model(base, jnp.float32)
    yield "decoder", DecoderSource.of(base, jcl.load_adapter(folder, base), model=model)
    if arguments.torch:
        yield "torch", TorchSource.open(jcl.TorchModel(arguments.source, device="cpu"), folder)
    for top in arguments.top:
        served = jcl.ServedModel(arguments.url, arguments.model, arguments.source, top_logprobs=top, requests=4)
        yield f"server, top {top}", ServedSource.open(served)


def run(arguments: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    questions = demo_questions()
    prompts = [question.prompt for question in questions[: arguments.prompts]]
    target = jcl.open_base(arguments.target)
    fit = Distill(completions=arguments.prompts, answer_temperature=0.0, answer_tokens=TOKENS, prompt_weight=0.0)
    said: dict[str, list[str]] = {}
    moved: dict[str, Adapter] = {}
    rows: list[tuple[Any, ...]] = []
    with shipped(SOURCE_ADAPTER) as folder, shipped(TARGET_ADAPTER) as trained:
        oracle = jcl.load_adapter(str(trained), target)
        for name, source in sources(arguments, str(folder)):
            key = jax.random.key(0)
            said[name] = [
                one.text for side in (source.alone(), source) for one in side.write(prompts, TOKENS, 0.0, key)
            ]
            print(f"{name} wrote", flush=True)
            if name == "torch":
                continue
            begun = time.monotonic()
            found: Distilled = distill(source, target, prompts=prompts, settings=fit, seed=arguments.seed)
            curve = found.curve[0].divergence, min(point.divergence for point in found.curve)
            rows.append((name, *curve, time.monotonic() - begun))
            moved[name] = found.adapter
            console.print(f"{name}: {'; '.join(fit_sentences(found.facts))}", soft_wrap=True)
    for one, other in combinations(said, 2):
        same = [a == b for a, b in zip(said[one], said[other], strict=True)]
        plain, adapted = sum(same[: len(prompts)]), sum(same[len(prompts) :])
        console.print(
            f"greedy answers of {TOKENS} tokens from {one} and {other}: of {len(prompts)} the same are {plain} without "
            f"the adapter, {adapted} with it",
            soft_wrap=True,
        )
    judged = questions[arguments.prompts :][: arguments.questions]
    scores = compare(target, {**moved, "trained": oracle}, judged, written=1)
    table = Table("source", "divergence", "after", "seconds", "log p / char", "lift", title=f"{len(judged)} questions")
    for name, first, best, seconds in rows:
        lift = scores.lift(name, "trained")
        interval = f"{lift.value:.3f} [{lift.low:.3f}, {lift.high:.3f}]"
        nats = f"{scores.log_likelihoods()[name]:.4f}"
        table.add_row(name, f"{first:.4f}", f"{best:.4f}", f"{seconds:.0f}", nats, interval)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="GGUF file of SmolLM2-135M-Instruct")
    parser.add_argument("--target", required=True, help="GGUF file of Gemma-3-270M")
    parser.add_argument("--url", required=True, help="of a server that has the source with its adapter")
    parser.add_argument("--model", default="smollm2", help="the server's name of the source with its adapter")
    parser.add_argument("--top", type=int, nargs="+", default=[20], help="likeliest tokens to ask the server for")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--questions", type=int, default=48, help="that the moved adapters are scored on")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args())
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"sources: {error}")


if __name__ == "__main__":
    main()
