"""Prompts behind a common beginning that is read once: the same as where each prompt is read whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_pairs import VARIANTS as COMMON_VARIANTS
from dense_models import VARIANTS, random_model
from expert_models import EXPERT_VARIANTS
from full_set import full_except
from hybrid_models import HYBRIDS
from probe_bases import CORPUS, save_tokenizer, write_base
from tiny_bases import random_adapter
from tiny_models import tiny_model

import jcrosslora as jcl
from jcrosslora.decoder import AmplifiedGenerator, Generator, generate, load_model, stack_adapter
from jcrosslora.decoder.prompt_batches import padded
from jcrosslora.decoder.sampling import Behind, Sampling
from jcrosslora.shelf.composition import compose
from jcrosslora.text.reading import prompt_ids

KEY = jax.random.key(0)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
# Longer than the windows of the models, the second with padding in front; what is behind them has some in the middle.
BEGINNINGS, LONGEST, OWNERS, TEXTS, WIDTH, ROOM = (20, 11), 20, (1, 0, 1, 0), (7, 1, 4, 8), 8, 6
MODELS = {
    "llama": lambda: tiny_model(*COMMON_VARIANTS["llama"][:1]),
    "gemma3": lambda: tiny_model("gemma3_text", **COMMON_VARIANTS["gemma3"][1]),
    **{
        name: lambda name=name: random_model(*(VARIANTS | EXPERT_VARIANTS | HYBRIDS)[name])
        for name in ("ministral3", "gpt_oss", "deepseek_v3", "gemma4", "llama4")
    },
}


@pytest.mark.parametrize("name", full_except(MODELS, ["llama"]))
def test_scores_and_what_is_written_are_those_of_whole_prompts(name):
    base = jcl.open_base(MODELS[name]())
    adapter = stack_adapter(random_adapter(base, rank=2, scale=0.05), base)
    model, rng = load_model(base).with_adapter(adapter), np.random.default_rng(0)
    beginnings = [rng.integers(3, 60, length).astype(np.int32) for length in BEGINNINGS]
    texts = [rng.integers(3, 60, length).astype(np.int32) for length in TEXTS]
    whole = [np.concatenate([beginnings[owner], text]) for owner, text in zip(OWNERS, texts, strict=True)]
    # A third beginning and a fifth row are empty.
    behind = Behind(*padded(beginnings, (3, LONGEST), True), np.array([*OWNERS, 0], np.int32))
    found = generate.prefill(model, *padded(texts, (5, WIDTH), True), behind, room=ROOM)
    wanted = generate.prefill(model, *padded(whole, (5, LONGEST + WIDTH), True), room=ROOM)
    for _ in range(2):
        np.testing.assert_array_equal(found.positions[:4], wanted.positions[:4])
        np.testing.assert_allclose(found.scores[:4], wanted.scores[:4], **CLOSE)
        found, tokens, _ = generate.extend(model, found, Sampling(jnp.float32(0), KEY), count=ROOM)
        wanted, exact, _ = generate.extend(model, wanted, Sampling(jnp.float32(0), KEY), count=ROOM)
        np.testing.assert_array_equal(tokens[:4], exact[:4])


# Three lists in front of prompts, some prompts alike, and others that begin like none.
LISTS = [" ".join(CORPUS[place:] + CORPUS[:place])[: 220 - 40 * place] + "\n" for place in range(3)]
ENDS = ("Anna", "Water boils at", "When and where", "Anna", "The lazy dog", "Light")
PROMPTS = [
    *(one + end for end in ENDS for one in LISTS),
    "Water boils at",
    "Where does Water boil? " * 9,
    "Anna",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    base = jcl.open_base(write_base(tmp_path_factory.mktemp("base"), 60, eos=1, layers=2))
    # A strong adapter, because a tied random model only repeats its last token.
    return Generator.of(base, random_adapter(base, scale=1.0), model=load_model(base))


@pytest.fixture(params=full_except(["plain", "amplified"], ["plain"]))
def generator(request, plain):
    own = {field.name: getattr(plain, field.name) for field in dataclasses.fields(Generator)}
    return plain if request.param == "plain" else AmplifiedGenerator(**own, strength=2.0)


def reads_behind(monkeypatch):
    """Note the shapes of beginnings and of what is read behind them."""
    seen, run = [], generate.prefill

    def noted(model, prompts, mask, behind, *, room):
        if behind is not None:
            seen.append((behind.tokens.shape, prompts.shape))
        return run(model, prompts, mask, behind, room=room)

    monkeypatch.setattr(generate, "prefill", noted)
    return seen


def alone(generator, prompt, count):
    """What is written greedily behind one prompt, read whole; as all are padded to one length, it is compiled once."""
    ids = prompt_ids(generator.tokenizer, prompt)
    (row,) = generator.continue_tokens([ids], count, 0.0, KEY, shape=(1, 192))
    return generator.decode([*ids[-4:], *row])[len(generator.decode(ids[-4:])) :]


def test_each_prompt_gets_the_answer_that_it_gets_alone(generator, monkeypatch):
    seen = reads_behind(monkeypatch)
    found = generator.write(PROMPTS, 6, 0.0, KEY)
    # Amplified, the base and the adapted base read each of them.
    assert len(seen) == (2 if isinstance(generator, AmplifiedGenerator) else 1)
    assert seen[0][0][0] == 4
    assert seen[0][1][0] == 24
    answers = {prompt: alone(generator, prompt, 6) for prompt in dict.fromkeys(PROMPTS)}
    assert [one.text for one in found] == [answers[prompt] for prompt in PROMPTS]
    assert len(set(answers.values())) > len(answers) / 2


def test_equal_prompts_are_read_once(plain, monkeypatch):
    seen = reads_behind(monkeypatch)
    found = plain.write(PROMPTS[:1] * 30, 6, 0.0, KEY)
    assert [(beginnings[0], texts) for beginnings, texts in seen] == [(1, (48, 16))]
    assert {one.text for one in found} == {alone(plain, PROMPTS[0], 6)}
    assert len({one.text for one in plain.write(PROMPTS[:1] * 30, 6, 1.0, KEY)}) > 1


def test_the_bar_advances_by_one_for_each_prompt(plain):
    class Bar:
        count = 0

        def update(self, count):
            self.count += count

    bar = Bar()
    plain.write(PROMPTS, 2, 0.0, KEY, bar=bar)
    assert bar.count == len(PROMPTS)


@pytest.mark.full
@pytest.mark.parametrize("name", full_except(["lfm2", "phi3-longrope"], ["lfm2"]))
def test_recurrent_bases_and_rotations_that_lengths_switch_read_prompts_whole(name, tmp_path, monkeypatch):
    seen = reads_behind(monkeypatch)
    family, settings = (HYBRIDS | COMMON_VARIANTS)[name]
    make = random_model if name in HYBRIDS else lambda family, settings: tiny_model(family, **settings)
    make(family, settings | {"vocab_size": save_tokenizer(tmp_path, 60, bos=False)}).save_pretrained(tmp_path)
    base = jcl.open_base(tmp_path)
    own = Generator.of(base, model=load_model(base))
    prompts = [one + "Water boils at" for one in LISTS[:1] * 9] + ["Water boils at"]
    found = own.write(prompts, 4, 0.0, KEY)
    assert [one.text for one in found] == [alone(own, prompt, 4) for prompt in prompts]
    assert not seen


@pytest.mark.full
def test_prompts_with_adapters_of_their_own_are_read_whole(tmp_path, monkeypatch):
    seen = reads_behind(monkeypatch)
    base = jcl.open_base(write_base(tmp_path, 60, layers=2))
    adapters = [random_adapter(base, seed=seed, scale=1.0) for seed in range(2)]
    composed, shares = compose(base, adapters, "mixture", model=load_model(base)), np.eye(2, dtype=np.float32)
    found = composed.generate(PROMPTS[:1] * 8, weights=np.tile(shares, (4, 1)), max_new_tokens=6, temperature=0.0)
    one = [Generator.of(base, adapter, model=load_model(base)) for adapter in adapters]
    assert found == [alone(each, PROMPTS[0], 6) for each in one] * 4
    assert found[0] != found[1]
    assert not seen
