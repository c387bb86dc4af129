"""What a copy costs an adapter that was trained on a quantised base (QLoRA), and what of that can be taken back.

    python experiments/quantised_source.py --source QUANTISED --target FULL --adapter ADAPTER --data train.jsonl
        --work WORK [--ranks 8 32] [--judged 200] [--rows "weighted, 8" ...] [--other ADAPTER_OF_TARGET ...]

The adapter was trained for the weights W_q + dW, so on the target W it lacks E = W_q - W. The rows are

    copy                  dW
    difference, R         dW and the best rank-R part of E: `interpolated-copy:interpolation=1,svd_rank=R`
    difference, R, cut    the same, cut to the rank of dW
    weighted, R           dW and the rank-R part of E that is best on the inputs of the task's texts, by a regression;
                          "no answers" has the inputs of the prompts alone
    own inputs            what of E can be added to b alone, on the same inputs: the rank stays
    own inputs, plain     the same for inputs without a preferred direction
    own spaces            E on the rows and the columns of dW: the rank doubles
    compensated           `compensated-copy` with the prompts
    fit                   `distilled-copy` with the prompts, answered by the source

judged by the right answers of the `--judged` examples of DATA in front of its last 200, which are the prompts: their
NLL in nats a token, and the share whose tokens are all the likeliest ("right"). Behind it the difference of the NLL
from the copy's, with its 95% interval over examples. DATA is training data, of which jobs.py trains on none of the last
400. A line of JSON for each row goes to WORK/quantised_source.jsonl.
"""

import argparse
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
from result_lines import commit
from rich.console import Console
from scripts import as_command, score_answers

import jcrosslora as jcl
from jcrosslora.adapter import Adapter, LoRAFactors
from jcrosslora.adapter.combining import add_factors
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import INPUT_SITES, fast_dtype, load_model, stack_adapter
from jcrosslora.evaluate.probes import Probes
from jcrosslora.maps.activations import batch_probes, cross_moments
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.methods import InterpolatedCopy
from jcrosslora.text import Completion
from jcrosslora.text.completion import prompt_text
from jcrosslora.training import read_examples
from jcrosslora.training.batches import as_completion, encode

PROMPTS, TEXTS = 200, 48  # for the fit; whose inputs are looked at
PENALTY = 1e-3  # of the regressions on inputs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "target", "adapter"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("data", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--judged", type=int, default=200)
    parser.add_argument("--rows", nargs="+", default=[], help="rows to make; all if not given")
    parser.add_argument("--other", nargs="+", default=[], help="adapters of the target that are judged as well")
    return parser.parse_args()


class Judge:
    """The NLL of right answers, summed for each example, and whether each would be written."""

    def __init__(self, base: BaseModel, examples: list[Completion], rank: int) -> None:
        self._items = [encode(load_tokenizer(base), one) for one in examples]
        self._base, self._model, self._rank = base, load_model(base, fast_dtype()), rank
        self.tokens = np.array([one.answer_tokens for one in self._items])

    def __call__(self, adapter: Adapter) -> tuple[np.ndarray, np.ndarray]:
        """Judge the base with an adapter."""
        padded = {name: self._padded(adapter.modules.get(name), *one.shape) for name, one in self._base.modules.items()}
        sums, right = score_answers(self._model, stack_adapter(Adapter(padded), self._base), self._items)
        return -sums, right

    def _padded(self, factors: LoRAFactors | None, outputs: int, inputs: int) -> LoRAFactors:
        """Pad factors to one rank with zeros: every rank would be compiled for itself."""
        a, b = np.zeros((self._rank, inputs), np.float32), np.zeros((outputs, self._rank), np.float32)
        if factors is not None:
            a[: factors.rank], b[:, : factors.rank] = factors.a, np.asarray(factors.b) * np.float32(factors.scale)
        return LoRAFactors(a=a, b=b)

    def difference(self, one: np.ndarray, other: np.ndarray) -> list[float]:
        """Return the difference of two NLLs a token with its interval over resampled examples."""
        drawn = np.random.default_rng(0).integers(len(one), size=(2000, len(one)))
        found = (one - other)[drawn].sum(axis=1) / self.tokens[drawn].sum(axis=1)
        return [float((one - other).sum() / self.tokens.sum()), *map(float, np.quantile(found, (0.025, 0.975)))]


def input_grams(source: BaseModel, target: BaseModel, texts: list[str]) -> dict[str, np.ndarray]:
    """Return the second moments of the inputs of each module of the source, by the module's name."""
    pair = BasePair(source, target)
    _, batches = batch_probes(pair, Probes(tuple(texts), "prompts"))
    moments = cross_moments(pair, batches, range(target.dims.layers), set(target.architecture.role_shapes), grams=True)
    assert moments.input_grams is not None
    grams = {site: np.asarray(both[0]) for site, both in moments.input_grams.items()}
    return {name: grams[INPUT_SITES[one.role]][one.layer] for name, one in target.modules.items()}


def added(adapter: Adapter, more: dict[str, LoRAFactors]) -> Adapter:
    """Add further factors to those of each module."""
    return Adapter({name: add_factors(name, [factors, more[name]]) for name, factors in adapter.modules.items()})


def by_inputs(adapter: Adapter, missing: dict[str, np.ndarray], grams: dict[str, np.ndarray] | None) -> Adapter:
    """Add to b what of E acts on the inputs that a reads: E C A' (A C A')^-1, with the inputs' second moments C."""
    modules = {}
    for name, one in adapter.modules.items():
        a, b = np.asarray(one.a, np.float64), np.asarray(one.b, np.float64) * one.scale
        read = a if grams is None else a @ grams[name].astype(np.float64)
        change = np.linalg.solve(read @ a.T, read @ missing[name].T.astype(np.float64)).T
        modules[name] = LoRAFactors(a=np.asarray(one.a), b=(b + change).astype(np.float32))
    return Adapter(modules)


def on_own_spaces(adapter: Adapter, missing: dict[str, np.ndarray]) -> Adapter:
    """Add P E + (1 - P) E Q, with the projectors P on the columns of b and Q on the rows of a."""
    more = {}
    for name, one in adapter.modules.items():
        outputs, inputs = (np.linalg.qr(np.asarray(x, np.float64))[0] for x in (one.b, one.a.T))
        inner = outputs.T @ missing[name]
        rest = missing[name] @ inputs - outputs @ (inner @ inputs)
        more[name] = LoRAFactors(
            a=np.concatenate([inner, inputs.T]).astype(np.float32),
            b=np.concatenate([outputs, rest], axis=1).astype(np.float32),
        )
    return added(adapter, more)


def on_inputs(missing: dict[str, np.ndarray], grams: dict[str, np.ndarray], rank: int) -> dict[str, LoRAFactors]:
    """Return the part of E of a rank that is best on the inputs of each module."""
    found = {}
    for name, change in missing.items():
        left, right = reduced_rank_ridge(grams[name], grams[name] @ change.T, min(rank, *change.shape))
        found[name] = LoRAFactors(a=left.T.astype(np.float32), b=right.astype(np.float32))
    return found


def reduced_rank_ridge(gram: np.ndarray, cross: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return left (M, R) and right (N, R), whose product W = left right' minimises ||X W - Y||_F^2 + c ||W||_F^2.

    `gram` is X'X (M, M) and `cross` X'Y (M, N); c is `PENALTY` times the mean of the gram's diagonal. With L L' = X'X +
    c I the best L'W of a rank is the truncated SVD of L^-1 X'Y (Izenman 1975; Mukherjee and Zhu 2011).
    """
    mean = np.mean(np.diagonal(gram)) or 1.0
    damped = gram.astype(np.float64) + PENALTY * mean * np.eye(len(gram))
    white = np.linalg.solve(np.linalg.cholesky(damped), cross)
    right = np.linalg.eigh(white.T @ white)[1][:, ::-1][:, :rank]
    return np.linalg.solve(damped, cross @ right), right


Variants = dict[str, Callable[[], Adapter]]


def variants(arguments: argparse.Namespace, prompts: list[Completion]) -> Variants:
    """Return what makes the adapters of the target, by their names, the copy first."""
    source, target = jcl.open_base(arguments.source), jcl.open_base(arguments.target)
    adapter = jcl.load_adapter(arguments.adapter, source)
    own = max(one.rank for one in adapter.modules.values())
    asked = [one.prompt for one in prompts]

    @cache
    def missing() -> dict[str, np.ndarray]:
        weights = ([base.weight(name).astype(np.float32) for base in (source, target)] for name in adapter.modules)
        return {name: first - second for name, (first, second) in zip(adapter.modules, weights, strict=True)}

    @cache
    def grams(*, answers: bool = True) -> dict[str, np.ndarray]:
        texts = [one.text if answers else prompt_text(one.prompt) for one in prompts[:TEXTS]]
        return input_grams(source, target, texts)

    def difference(rank: int, cut: int | None) -> Adapter:
        method = InterpolatedCopy(interpolation=1.0, svd_rank=rank)
        return jcl.transfer(adapter, source, target, method, out_rank=cut, effect="never").adapter

    found: Variants = {"copy": lambda: adapter}
    for rank in arguments.ranks:
        found[f"difference, {rank}"] = partial(difference, rank, None)
        found[f"difference, {rank}, cut"] = partial(difference, rank, own)
        found[f"weighted, {rank}"] = lambda rank=rank: added(adapter, on_inputs(missing(), grams(), rank))
        found[f"weighted, {rank}, no answers"] = lambda rank=rank: added(
            adapter, on_inputs(missing(), grams(answers=False), rank)
        )
    found["own inputs"] = lambda: by_inputs(adapter, missing(), grams())
    found["own inputs, plain"] = lambda: by_inputs(adapter, missing(), None)
    found["own spaces"] = lambda: on_own_spaces(adapter, missing())
    for name, method in (("compensated", "compensated-copy"), ("fit", "distilled-copy")):
        move = partial(jcl.transfer, adapter, source, target, method, prompts=asked, effect="never")
        found[name] = lambda move=move: move().adapter
    for path in arguments.other:
        found[Path(path).name] = lambda path=path: jcl.load_adapter(path, target)
    return found


def run(arguments: argparse.Namespace, console: Console) -> None:
    known = [as_completion(one) for one in read_examples(arguments.data)]
    judged, prompts = known[-PROMPTS - arguments.judged : -PROMPTS], known[-PROMPTS:]
    arguments.work.mkdir(parents=True, exist_ok=True)
    made = {"source": Path(arguments.source).stem, "target": Path(arguments.target).stem, "data": arguments.data.stem}
    made |= {"adapter": Path(arguments.adapter).name, "judged": len(judged), "commit": commit()}

    def add(judge: Judge, name: str, found: tuple[np.ndarray, np.ndarray], copied: np.ndarray | None = None) -> None:
        row: dict[str, object] = {"row": name, "nll": round(found[0].sum() / judge.tokens.sum(), 4)}
        row |= {"right": round(float(found[1].mean()), 3)}
        if copied is not None:
            row["minus_copy"] = [round(value, 4) for value in judge.difference(found[0], copied)]
        console.print(json.dumps(row), highlight=False, soft_wrap=True)
        with (arguments.work / "quantised_source.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(made | row) + "\n")

    source = jcl.open_base(arguments.source)
    adapter = jcl.load_adapter(arguments.adapter, source)
    rank = max(one.rank for one in adapter.modules.values()) + max(16, *arguments.ranks)
    judge_source = Judge(source, judged, rank)
    add(judge_source, "source", judge_source(Adapter({})))
    taught = judge_source(adapter)
    add(judge_source, "source with the adapter", taught)
    del judge_source
    judge_target = Judge(jcl.open_base(arguments.target), judged, rank)
    add(judge_target, "target", judge_target(Adapter({})))
    copied = None
    for name, make in variants(arguments, prompts).items():
        if arguments.rows and name not in ("copy", *arguments.rows, *(Path(path).name for path in arguments.other)):
            continue
        found = judge_target(make())
        copied = found[0] if copied is None else copied
        add(judge_target, name, found, copied)
    add(judge_target, "source with the adapter, again", taught, copied)


def main() -> None:
    with as_command():
        run(parse(), Console(width=120))


if __name__ == "__main__":
    main()
