"""Prompts in a queue: each gets the tokens that it gets alone, in fewer steps than whole batches take."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from decoder_pairs import VARIANTS as COMMON_VARIANTS
from decoder_pairs import torch_logits
from dense_models import VARIANTS, random_model
from expert_models import EXPERT_VARIANTS
from full_set import full_except
from hybrid_models import HYBRIDS
from tiny_bases import random_adapter
from tiny_models import tiny_model, torch

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


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    """Two models of phi3 from the same files, torch's and ours, whose rotations switch after 32 tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0}
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7], "long_factor": [1.0, 9.0, 20.0, 30.0, 50.0, 80.0]}
    sizes = {"max_position_embeddings": 256, "original_max_position_embeddings": 32}
    model = tiny_model("phi3", rope_parameters=rope | factors, tie_word_embeddings=False, **sizes)
    with torch.no_grad():  # so that what is attended to decides what is written
        for name, parameter in model.named_parameters():
            parameter.mul_(3.0 if "_proj" in name else 1.0)
    folder = tmp_path_factory.mktemp("phi3")
    model.save_pretrained(folder)
    base = jcl.open_base(folder)
    return model, Generator(load_model(base), SimpleNamespace(stops=()), "base", None)


def crossing(copies):
    rng = np.random.default_rng(0)
    return [rng.integers(8, VOCAB, length).astype(np.int32) for length in (3, 20, 27, 31, 32, 33, 40)] * copies


@pytest.mark.parametrize("copies", full_except([1, 8], [8]), ids=["batch", "queue"])
def test_texts_that_outgrow_the_first_rotations_are_those_of_transformers(switched, copies):
    model, generator = switched
    ids = crossing(copies)
    found = generator.write_tokens(ids, 24, 0.0, KEY, bar=None)
    together = generator.continue_tokens(ids[:7], 24, 0.0, KEY)
    for prompt, row, other in zip(ids[:7], found, together, strict=False):
        wanted = greedy_of_torch(model, prompt, 24)
        np.testing.assert_array_equal(row, wanted)
        np.testing.assert_array_equal(other, wanted)
    for prompt, row in zip(ids, found, strict=True):
        np.testing.assert_array_equal(row, found[[*map(len, ids)].index(len(prompt))])


def test_sampled_texts_that_outgrow_the_first_rotations_follow_the_logits_of_transformers(switched):
    model, generator = switched
    (row,) = generator.continue_tokens(crossing(1)[2:3], 24, 0.05, KEY)
    text = np.concatenate([crossing(1)[2], row])
    # At a low temperature, what is drawn is nearly the likeliest of the rotations that apply to the text so far.
    for place in range(27, len(text)):
        scores = torch_logits(model, text[None, :place])[0, -1]
        assert scores.max() - scores[text[place]] < 1.0


def greedy_of_torch(model, prompt, count):
    with torch.no_grad():
        ids = torch.tensor(prompt[None])
        found = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return found[0, len(prompt) :].numpy()
