"""What is left of each adapter's own gain where several adapters of one base act together, without being told which.

    python experiments/compose.py --base BASE --task NAME:TRAIN:TEST:ADAPTER --task ... --work WORK

Test prompts of all tasks are mixed. A figure is the share of what the task's own adapter gains in the likelihood of
right answers that a way of composing keeps: (base - composed) / (base - own), in nats an answer, with 95% intervals
over examples, the same resampled ones in all terms. Ways:

- retrieved: `select` with the adapter that a shelf finds (vectors of the base's hidden states, 32 train prompts of each
  task as samples), or the base alone where it finds none
- retrieved, top 2: `mixture` of the two best that it finds
- uniform, random-gate: the controls
- gated, router: trained without labels on what each adapter answers to `--texts` train prompts of its task

TRAIN and TEST are JSONL as `read_examples` takes them. A line of each row goes to WORK/composed.jsonl.
"""

import argparse
import dataclasses
import json
import time
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from retrieve import add
from rich.console import Console
from scripts import as_command, wide_console

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import fast_dtype, load_model
from jcrosslora.evaluate import lift_recovered, read_examples
from jcrosslora.evaluate.examples import as_completion
from jcrosslora.shelf.composition import RATE, Composed
from jcrosslora.text import Completion
from jcrosslora.training import Example, TrainingSettings
from jcrosslora.utils.picking import from_start

WAYS = ("retrieved", "retrieved, top 2", "uniform", "random-gate", "gated", "router")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--task", action="append", required=True, metavar="NAME:TRAIN:TEST:ADAPTER")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--way", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--limit", type=int, default=50, help="test examples of each task")
    parser.add_argument("--texts", type=int, default=48, help="train prompts of each task that its adapter answers")
    parser.add_argument("--answer", type=int, default=64, help="the most tokens of such an answer")
    parser.add_argument("--steps", type=int, default=80, help="of the training of gates and routers")
    parser.add_argument("--rate", type=float, default=RATE, help="highest learning rate of it")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def random_gate(gated: Composed, seed: int) -> Composed:
    """Draw the weights and the bias of gates from a normal distribution, as AutoLoRA does before training; w_o is 1."""
    rng, found = np.random.default_rng(seed), {}
    for role, one in gated.updates.roles.items():
        found[role] = dict(one.arrays, weight_out=jnp.ones_like(one.arrays["weight_out"]))
        for name in ("weight_base", "weight_lora", "weight_cross", "bias"):
            found[role][name] = jnp.asarray(rng.normal(size=one.arrays[name].shape).astype(np.float32))
    return dataclasses.replace(gated, updates=gated.updates.with_arrays(found))


def one_hot(owners: list[int], count: int) -> np.ndarray:
    """Weights (P, N) that give each prompt the adapter that owns it."""
    return np.eye(count, dtype=np.float32)[owners]


def own_texts(chosen: Composed, tasks: list[list[str]], arguments: argparse.Namespace) -> list[list[Completion]]:
    """Let each adapter answer train prompts of its own task."""
    asked = [
        (as_completion(one).prompt, owner)
        for owner, (_, train, *_) in enumerate(tasks)
        for one in from_start(read_examples(train), arguments.texts)
    ]
    prompts, owners = [prompt for prompt, _ in asked], [owner for _, owner in asked]
    weights = one_hot(owners, len(tasks))
    written = chosen.write(prompts, weights=weights, max_new_tokens=arguments.answer)
    found: list[list[Completion]] = [[] for _ in tasks]
    for prompt, owner, one in zip(prompts, owners, written, strict=True):
        if one.text.strip():
            found[owner].append(Completion(prompt, one.text, one.ended))
    return found


def run(arguments: argparse.Namespace, console: Console) -> None:
    tasks = [text.split(":") for text in arguments.task]
    base = jcl.open_base(arguments.base)
    loaded = {"model": load_model(base, fast_dtype()), "tokenizer": load_tokenizer(base)}
    adapters = [adapter for *_, adapter in tasks]
    owned: list[tuple[Example, int]] = [
        (one, owner) for owner, (*_, test, _) in enumerate(tasks) for one in read_examples(test)[: arguments.limit]
    ]
    examples, owners = [one for one, _ in owned], np.array([owner for _, owner in owned])
    prompts = [as_completion(one).prompt for one in examples]
    arguments.work.mkdir(parents=True, exist_ok=True)
    shelf = jcl.Shelf(arguments.work / "shelf", base)
    names = [add(shelf, name, train, [adapter], arguments.work)[0] for name, train, _, adapter in tasks]
    order = [shelf.names.index(name) for name in names]
    found = shelf.search(prompts)
    first = found.ranked()[:, 0]
    right = np.mean(np.array(order)[owners] == first)
    for owner, (name, *_) in enumerate(tasks):
        others = Counter(shelf.names[place] for place in first[owners == owner])
        console.print(f"{name}: first is " + ", ".join(f"{other} {count}" for other, count in others.most_common()))
    console.print(f"retrieval: top-1 {right:.3f}, {np.mean(~found.accepted.any(axis=1)):.3f} get the base alone")
    chosen = jcl.compose(base, adapters, "select", **loaded)
    base_nll, own_nll = (
        -chosen.score(examples, weights=weights)
        for weights in (np.zeros(len(tasks)), one_hot(owners.tolist(), len(tasks)))
    )
    texts = own_texts(chosen, tasks, arguments) if {"gated", "router"} & set(arguments.way) else []
    for way in arguments.way:
        begun = time.monotonic()
        weights = None
        if way.startswith("retrieved"):
            top = 2 if way.endswith("2") else 1
            weights = found.weights(top)[:, order]
            composed = chosen if top == 1 else jcl.compose(base, adapters, "mixture", **loaded)
        else:
            random = way == "random-gate"
            composed = jcl.compose(base, adapters, "gated" if random else way, seed=arguments.seed, **loaded)
            if random:
                composed = random_gate(composed, arguments.seed)
            elif composed.how.trained:
                settings = TrainingSettings(steps=arguments.steps, rate=arguments.rate, seed=arguments.seed)
                composed = composed.fit(texts, settings)
        nll = -composed.score(examples, weights=weights)
        row = {"way": way, "rate": arguments.rate, "examples": len(examples), "seed": arguments.seed}
        for owner, (name, *_) in [*enumerate(tasks), (None, ("all",))]:
            part = np.ones(len(owners), bool) if owner is None else owners == owner
            kept = lift_recovered(base_nll[part], nll[part], own_nll[part])
            row[name] = vars(kept)
            console.print(f"{way}: {name} {kept.value:.3f} [{kept.low:.3f}, {kept.high:.3f}]")
        console.print(f"{way}: {time.monotonic() - begun:.0f} s")
        with (arguments.work / "composed.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    with as_command():
        run(parse(), wide_console())


if __name__ == "__main__":
    main()
