"""The three programs that a fit spends its time in, beside what people run instead: medians of interleaved runs.

    python tools/bench_fit.py BASE [--rivals peft llama.cpp] [--only write read step]
        [--rows 4] [--width 96] [--texts 48] [--prompt 64] [--answer 32] [--repeats 5]

Timed are, for a base of which the decoder and transformers can run the whole,

- write: `--answer` tokens behind each of `--texts` prompts of `--prompt` tokens, sampled, none of which ends;
- read: predictions among 6,500 tokens at all positions of `--rows` texts of `--width` tokens;
- step: the gradient of a divergence of such predictions for a LoRA of rank 16 on all modules, and a step of Adam.

`peft` is transformers on torch with bfloat16 weights and peft's LoRA in all three. `llama.cpp` (extra `engines`) writes
alone: BASE has to be a GGUF file, whose quantised weights it uses as they are, without an adapter, with as many slots
as there are texts. `--rivals` without a name times this package alone; to compare two states of it, do that with each
(PYTHONPATH).

A pass is counted as two operations for each weight of the layers and of the predicting rows, and token; a step as two
passes, for no weight has a gradient. "of the rate" compares them with the best of 20 products of 512 x 1,024 and
1,024 x 1,024 bfloat16 matrices in XLA, one straight after the other. "of the memory's" compares the bytes of weights
that the written tokens need, read once for each place in the texts, with the best of 20 sums of 256 MB. Ratios of wall
time mean nothing on a busy machine; to time a single core, start it with `taskset -c 0`.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
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
PROGRAMS = ("write", "read", "step")
_ROWS, _SIDE, _TRIES = 512, 1024, 20  # of the products that the rate is taken from
_SUMMED = 1 << 28  # bytes
_SETTINGS = DistillSettings()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    for name, usual in {"rows": 4, "width": 96, "texts": 48, "prompt": 64, "answer": 32, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--rivals", nargs="*", choices=tuple(RIVALS), default=["peft"])
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS)
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


def peft_programs(base: BaseModel, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
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


def llama_cpp_programs(base: BaseModel, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Writing in llama.cpp, with all texts in one batch."""
    if Path(arguments.base).suffix != ".gguf":
        sys.exit(f"bench_fit: llama.cpp reads GGUF files, and {arguments.base} is none")
    engine: Any = import_module("xllamacpp")
    params = engine.CommonParams()
    params.model.path = arguments.base
    params.n_ctx = arguments.texts * (arguments.prompt + arguments.answer + 32)
    params.n_parallel, params.n_gpu_layers, params.verbosity, params.warmup = arguments.texts, 0, 0, False
    params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = engine.Server(params)
    prompts = drawn((arguments.texts, arguments.prompt), base.dims.vocab).tolist()
    how = {"max_tokens": arguments.answer, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

    def write() -> None:
        found = server.handle_completions({"prompt": prompts, "ignore_eos": True, "cache_prompt": False} | how)
        if "choices" not in found or len(found["choices"]) != arguments.texts:
            sys.exit(f"bench_fit: llama.cpp says {found}")

    return {"write": write}


RIVALS = {"peft": peft_programs, "llama.cpp": llama_cpp_programs}


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
    best = min(median_seconds({"product": lambda: product(left, right)}, 1)["product"] for _ in range(_TRIES))
    return 2 * _ROWS * _SIDE**2 / best


def memory_rate() -> float:
    """Bytes a second that are read from memory."""
    numbers, total = jnp.ones(_SUMMED // 4, jnp.float32), jax.jit(jnp.sum)
    return _SUMMED / min(median_seconds({"sum": lambda: total(numbers)}, 1)["sum"] for _ in range(_TRIES))


def main() -> None:
    arguments = parse()
    try:
        base = open_base(arguments.base)
        model = load_model(base, jnp.bfloat16)
    except JCrossLoRAError as error:
        sys.exit(f"bench_fit: {error}")
    mine = ours(base, model, arguments)
    rivals = {name: RIVALS[name](base, arguments) for name in arguments.rivals}
    print(f"{base.name} on {jax.default_backend()}, {len(os.sched_getaffinity(0))} cores, jax {jax.__version__}")
    products, memory, counts = product_rate(), memory_rate(), operations(base, model, arguments)
    held = 2 * (sum(weight.size for weight in model.params.weights.values()) + base.dims.vocab * base.dims.hidden)
    print(f"{products / 1e9:.0f} billion operations a second in products, {memory / 1e9:.1f} GB a second of memory")
    for name in arguments.only:
        sides = {"ours": mine[name]} | {rival: each[name] for rival, each in rivals.items() if name in each}
        seconds = median_seconds(sides, arguments.repeats)
        own = seconds.pop("ours")
        line = f"{name:6} {own:7.3f} s, {counts[name] / own / products:4.0%} of the rate"
        if name == "write":
            line += f", {held * arguments.answer / own / memory:4.0%} of the memory's"
        line += "".join(f"; {rival} {taken:7.3f} s, {taken / own:5.2f} x" for rival, taken in seconds.items())
        print(line, flush=True)


if __name__ == "__main__":
    main()
