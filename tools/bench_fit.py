"""The three programs that a fit spends its time in, beside transformers and peft: medians of interleaved runs.

    python tools/bench_fit.py BASE [--rows 4] [--width 96] [--texts 48] [--prompt 64] [--answer 32] [--repeats 5]
        [--alone]

Timed are, for a base of which the decoder and transformers can run the whole,

- write: `--answer` tokens behind each of `--texts` prompts of `--prompt` tokens, sampled, none of which ends;
- read: predictions among 6,500 tokens at all positions of `--rows` texts of `--width` tokens;
- step: the gradient of a divergence of such predictions for a LoRA of rank 16 on all modules, and a step of Adam.

The rival has bfloat16 weights as well, with peft's LoRA in all three; `--alone` leaves it out. A pass is counted as two
operations for each weight of the layers and of the predicting rows, and token; a step as two passes, for no weight has
a gradient. "of the rate" compares them with the best of 20 products of 512 x 1,024 and 1,024 x 1,024 bfloat16 matrices
in XLA, one straight after the other. To compare two states of this package, run the script beside each (PYTHONPATH)
with `--alone`. Ratios of wall time mean nothing on a busy machine; to time a single core, start it with `taskset -c 0`.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from interleaved import median_seconds

from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.decoder import Model, Sampling, extend, load_model, prefill
from jcrosslora.distill.fit import first_state, gradient_step, needs_remat
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.distill.sources.decoder import RestrictedModel, shared_log_probs
from jcrosslora.distill.teacher import TaughtBatch
from jcrosslora.errors import JCrossLoRAError

COMPARED = 6500
_ROWS, _SIDE, _PRODUCTS = 512, 1024, 20  # of the products that the rate is taken from
_SETTINGS = DistillSettings()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    for name, usual in {"rows": 4, "width": 96, "texts": 48, "prompt": 64, "answer": 32, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--alone", action="store_true", help="without the rival, which needs the test extra")
    found = parser.parse_args()
    if min(vars(found)[name] for name in ("rows", "width", "texts", "prompt", "answer", "repeats")) < 1:
        sys.exit("bench_fit: all numbers have to be 1 or more")
    return found


def drawn(shape: tuple[int, int], vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)


def ours(base: BaseModel, model: Model, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed of this package."""
    vocab, count = base.dims.vocab, arguments.rows * arguments.width
    compared = min(COMPARED, vocab)
    restricted = RestrictedModel.of(model, np.arange(compared))
    state = first_state(model, _SETTINGS)
    writer, reader = model.with_adapter(state.factors), restricted.with_adapter(state.factors)
    tokens, mask = jnp.asarray(drawn((arguments.rows, arguments.width), compared)), jnp.ones(count, bool)
    teacher = jnp.full((count, compared), -np.log(compared), jnp.float32)
    read_by = tokens, mask.reshape(tokens.shape), jnp.arange(count, dtype=jnp.int32)
    batch = TaughtBatch(*read_by, jnp.ones(count), teacher)
    prompts = jnp.asarray(drawn((arguments.texts, arguments.prompt), vocab))
    every = jnp.ones(prompts.shape, bool)
    again = needs_remat(model.settings, tokens.shape)

    def write() -> Any:
        begun = prefill(writer, prompts, every, room=arguments.answer)
        return extend(writer, begun, Sampling(jnp.float32(1), jax.random.key(0)), count=arguments.answer)[1]

    def step() -> Any:
        return gradient_step(restricted, state, batch, jnp.float32(1e-4), remat=again)

    def read() -> Any:
        return shared_log_probs(reader, *read_by)

    return {"write": write, "read": read, "step": step}


def theirs(base: BaseModel, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The same in transformers and peft."""
    import peft
    import torch
    from torch_model import torch_model

    modules = sorted({name.rpartition(".")[2] for name in base.modules})
    how = peft.LoraConfig(r=_SETTINGS.fit_rank, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(torch_model(base, torch.bfloat16), how)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4, betas=(0.9, 0.99))
    compared = min(COMPARED, base.dims.vocab)
    tokens = torch.from_numpy(drawn((arguments.rows, arguments.width), compared)).long()
    prompts = torch.from_numpy(drawn((arguments.texts, arguments.prompt), base.dims.vocab)).long()
    teacher = torch.full((tokens.numel(), compared), -np.log(compared))
    head = model.get_output_embeddings().weight[:compared]  # pyright: ignore[reportAttributeAccessIssue]
    decoder: Any = model.get_base_model().get_decoder

    def predictions() -> torch.Tensor:
        inner: Any = decoder()
        hidden = inner(input_ids=tokens).last_hidden_state.reshape(tokens.numel(), -1)
        return torch.log_softmax((hidden @ head.T).float(), dim=-1)

    def step() -> None:
        optimizer.zero_grad()
        loss = torch.sum(teacher.exp() * (teacher - predictions())) / tokens.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    @torch.no_grad()
    def write() -> Any:
        every = torch.ones_like(prompts)
        much = {"max_new_tokens": arguments.answer, "min_new_tokens": arguments.answer, "pad_token_id": 0}
        return model.generate(input_ids=prompts, attention_mask=every, do_sample=True, top_k=0, **much)

    return {"write": write, "read": torch.no_grad()(predictions), "step": step}


def operations(base: BaseModel, model: Model, arguments: argparse.Namespace) -> dict[str, float]:
    """Operations of each program."""
    inner, hidden = sum(weight.size for weight in model.params.weights.values()), base.dims.hidden
    read = 2 * arguments.rows * arguments.width * (inner + min(COMPARED, base.dims.vocab) * hidden)
    written = arguments.texts * (arguments.prompt + arguments.answer)
    head = arguments.texts * (1 + arguments.answer) * base.dims.vocab * hidden
    return {"write": 2.0 * (written * inner + head), "read": float(read), "step": 2.0 * read}


def product_rate() -> float:
    """Operations a second of products of bfloat16 matrices."""
    left, right = jnp.ones((_ROWS, _SIDE), jnp.bfloat16), jnp.ones((_SIDE, _SIDE), jnp.bfloat16)
    product = jax.jit(partial(jnp.dot, preferred_element_type=jnp.float32))
    best = min(median_seconds({"product": lambda: product(left, right)}, 1)["product"] for _ in range(_PRODUCTS))
    return 2 * _ROWS * _SIDE**2 / best


def main() -> None:
    arguments = parse()
    try:
        base = open_base(arguments.base)
        model = load_model(base, jnp.bfloat16)
    except JCrossLoRAError as error:
        sys.exit(f"bench_fit: {error}")
    sides = {"ours": ours(base, model, arguments)}
    if not arguments.alone:
        sides["theirs"] = theirs(base, arguments)
    print(f"{base.name} on {jax.default_backend()}, jax {jax.__version__}")
    rate = product_rate()
    for name, count in operations(base, model, arguments).items():
        seconds = median_seconds({side: programs[name] for side, programs in sides.items()}, arguments.repeats)
        mine = seconds["ours"]
        line = f"{name:6} {mine:7.3f} s, {count / mine / rate:4.0%} of the rate"
        if not arguments.alone:
            line += f"; transformers and peft {seconds['theirs']:7.3f} s, {seconds['theirs'] / mine:5.2f} x"
        print(line, flush=True)


if __name__ == "__main__":
    main()
