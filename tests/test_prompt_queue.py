"""Prompts in a queue: each gets the tokens that it gets alone, in fewer steps than whole batches take."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from decoder_pairs import VARIANTS as COMMON_VARIANTS
from dense_models import VARIANTS, random_model
from expert_models import EXPERT_VARIANTS
from full_set import full_except
from hybrid_models import HYBRIDS
from tiny_bases import random_adapter
from tiny_models import tiny_model

import jcrosslora as jcl
from jcrosslora.decoder import AmplifiedGenerator, Generator, load_model, stack_adapter
from jcrosslora.decoder.prompt_batches import PromptBatch
from jcrosslora.decoder.prompt_queue import write_queue

KEY = jax.random.key(0)
ROOM = 20  # more than two looks, and no multiple of what programs are compiled for
VOCAB = 60
MODELS = {
    "llama": lambda: tiny_model(*COMMON_VARIANTS["llama"][:1]),
    "gemma3": lambda: tiny_model("gemma3_text", **COMMON_VARIANTS["gemma3"][1]),
    **{
        name: lambda name=name: random_model(*(VARIANTS | EXPERT_VARIANTS | HYBRIDS)[name])
        for name in ("gpt_oss", "deepseek_v3", "llama4", "lfm2")
    },
}


@pytest.fixture(params=full_except([*MODELS, "amplified"], ["llama"]))
def generator(request):
    """One whose texts end at any of five tokens."""
    name = request.param if request.param in MODELS else "llama"
    base = jcl.open_base(MODELS[name]())
    # A strong adapter, because a tied random model only repeats its last token.
    model = load_model(base).with_adapter(stack_adapter(random_adapter(base, rank=2, scale=1.0), base))
    own = model, SimpleNamespace(stops=(3, 4, 5, 6, 7)), "base", "adapter"
    return Generator(*own) if name == request.param else AmplifiedGenerator(*own, strength=2.0)


def prompts():
    """Prompts of 1 to 30 tokens, and two long ones with a common beginning."""
    rng = np.random.default_rng(0)
    found = [rng.integers(8, VOCAB, length).astype(np.int32) for length in [*range(1, 31)] * 2]
    long = rng.integers(8, VOCAB, 210).astype(np.int32)
    return [*found, long, np.concatenate([long[:-3], [9, 10]]).astype(np.int32)]


def alone(generator, ids):
    """What is written after one prompt, padded on the right as no other is; compiled for two lengths."""
    batch = PromptBatch([0], [ids], (1, 32 if len(ids) <= 32 else 224))
    return generator._continue(batch, (ROOM, 0.0, KEY), pad_left=False)[0]


def test_each_prompt_gets_what_it_gets_alone(generator):
    ids = prompts()
    found = generator.write_tokens(ids, ROOM, 0.0, KEY, bar=None)
    wanted = [alone(generator, one) for one in ids]
    for row, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(row, other)
    lengths = [len(row) for row in found]
    assert max(lengths) == ROOM
    assert min(lengths) < ROOM / 2
    assert len({row.tobytes() for row in found}) > len(ids) / 2


def test_rows_of_texts_that_have_ended_go_to_other_prompts(monkeypatch):
    base = jcl.open_base(MODELS["llama"]())
    model = load_model(base).with_adapter(stack_adapter(random_adapter(base, rank=2, scale=1.0), base))
    generator, rows = Generator(model, SimpleNamespace(stops=tuple(range(3, 30))), "base", None), []

    def noted(self, state, sampling, count):
        rows.append(int(np.sum(state.running)))
        return run(self, state, sampling, count)

    run = Generator.extend
    monkeypatch.setattr(Generator, "extend", noted)
    ids = [one for one in prompts() if len(one) <= 30] * 4
    found = write_queue(generator, ids, ROOM)
    # Whole batches of 48 texts, one of which at least runs to the end, take 3 looks each.
    assert max(map(len, found)) == ROOM
    assert len(rows) < 0.8 * 3 * len(ids) / 48
    assert max(rows) == 48
