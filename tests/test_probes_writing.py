"""Texts that a base writes itself."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_set import full_except
from probe_bases import write_base
from safetensors.numpy import load_file, save_file
from tiny_bases import random_adapter

from jcrosslora import written_probes
from jcrosslora.checkpoint import load_tokenizer, open_base
from jcrosslora.decoder import fast_dtype, forward, load_model, logits, stack_adapter
from jcrosslora.errors import AdapterError, CheckpointError, MethodError, UsageError
from jcrosslora.evaluate.probes import TextSettings, probe_batches, start_words, write_texts

LENGTH = 24
HOT = 20.0  # the logits of a random tied model are so far apart that it would repeat its last token at 1


@pytest.fixture(scope="module", params=full_except([False, True], [True]), ids=["no-bos", "bos"])
def base(request, tmp_path_factory):
    return open_base(write_base(tmp_path_factory.mktemp("base"), 150, bos=request.param))


def write(base, count, *, adapter=None, batch=4, model=None, **settings):
    settings = {"length": LENGTH, "temperature": HOT} | settings
    return write_texts(base, TextSettings(count, **settings), adapter, batch=batch, model=model)


def written_by_whole_passes(base, adapter, words):
    """Greedy decoding without a cache; what is behind the last token cannot matter."""
    ours, tokenizer = load_model(base), load_tokenizer(base)
    stacked = stack_adapter(adapter, base)
    run = jax.jit(lambda tokens: logits(ours, forward(ours.with_adapter(stacked), tokens).hidden))
    start = 1 if tokenizer.bos is None else 2
    text = np.full((len(words), start + LENGTH), tokenizer.bos or 0, np.int32)
    text[:, start - 1] = words
    for place in range(start, text.shape[1]):
        text[:, place] = jnp.argmax(run(text)[:, place - 1], axis=-1)
    return [tokenizer.decode(row).rstrip("\ufffd") for row in text]


def test_texts_are_samples_of_the_model(base):
    adapter = random_adapter(base, rank=4, scale=1.0)
    found = write(base, 5, temperature=0.0, adapter=adapter, seed=5, model=load_model(base))
    words = start_words(base.vocabulary().tokens, 5, 5)
    assert len(set(words)) == 5
    assert found == written_by_whole_passes(base, adapter, words)


def test_equal_seeds_give_equal_texts(base):
    first = write(base, 6, seed=1)
    assert write(base, 6, seed=1) == first
    assert write(base, 6, seed=1, model=load_model(base, fast_dtype())) == first
    assert not set(write(base, 6, seed=2)) & set(first)
    assert len(set(first)) == 6


def test_every_text_starts_with_a_capitalised_word(base):
    tokens = base.vocabulary().tokens
    for text in write(base, 8, seed=3):
        starts = [t.decode() for t in tokens if t.isalpha() and t.istitle() and b" " + t in tokens]
        assert len(starts) > 3
        assert any(text.startswith(word) for word in starts)
        assert text.strip()


@pytest.mark.parametrize("silent", [True, False], ids=["one token", "one text"])
def test_repetitive_and_duplicate_texts_are_dropped(tmp_path, silent):
    folder = write_base(tmp_path, 150, hidden=48, seed=1)
    tensors = load_file(folder / "model.safetensors")
    if silent:  # layers that add nothing: a tied model then finds its last token the likeliest
        tensors |= {name: np.zeros_like(t) for name, t in tensors.items() if "o_proj" in name or "down_proj" in name}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MethodError) as caught:
        write(open_base(folder), 10, temperature=0.0)
    assert ("only 0 of 40" in str(caught.value)) == silent
    assert "temperature 0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_non_finite_predictions_are_refused(tmp_path):
    folder = write_base(tmp_path, 150)
    base = open_base(folder)
    with pytest.raises(AdapterError, match=r"gives predictions that are not finite on .*: its factors, or"):
        write(base, 3, adapter=random_adapter(base, scale=1e30))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="gives predictions that are not finite: its weights"):
        write(open_base(folder), 3)


def test_generation_ends_at_a_stop_token_and_short_texts_are_replaced(tmp_path):
    free = open_base(write_base(tmp_path / "free", 150))
    tokenizer, more = load_tokenizer(free), write(free, 24, seed=4)
    # Of the tokens that a text has early, the one that is later most common. Merged tokens only: single bytes also
    # come from reading U+FFFD, which the model never wrote.
    ids = [tokenizer.encode(text).ids for text in more[:12]]
    later = Counter(np.concatenate([row[10:] for row in ids]).tolist())
    stop = max((int(token) for row in ids for token in row[2:6] if token >= 258), key=lambda token: later[token])
    base = open_base(write_base(tmp_path / "stopping", 150, eos=stop))
    assert stop in load_tokenizer(base).stops
    stopped = write(base, 12, seed=4)
    assert len(stopped) == 12
    # The same weights and seed: each text is what the free model writes, up to the stop token.
    cut = [next((text for text in more if text.startswith(one)), "") for one in stopped]
    assert "" not in cut
    left = [text[len(one) :].lstrip("\ufffd") for one, text in zip(stopped, cut, strict=True)]
    assert any(left)
    assert all(rest.startswith(tokenizer.decode([stop])) for rest in left if rest)
    # A text of the free model that has the token early was not taken.
    early = [text for text in more if stop in tokenizer.encode(text).ids[2:6]]
    assert early
    assert not [one for one in stopped for text in early if text.startswith(one)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"count": 0}, "0 texts"),
        ({"length": 0}, "0 tokens"),
        ({"batch": 0}, "batches of 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1 << 70}, "seed"),
        ({"temperature": -1.0}, "-1.0"),
        ({"temperature": float("nan")}, "nan"),
    ],
)
def test_settings_out_of_range_are_refused(base, settings, named):
    with pytest.raises(UsageError, match=named):
        write(base, **{"count": 1, **settings})


def test_base_without_a_tokenizer_is_refused(tmp_path):
    folder = write_base(tmp_path, 20)
    (folder / "tokenizer.json").unlink()
    base = open_base(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        write_texts(base, TextSettings(1))


def test_start_words_repeat_only_after_all_were_used():
    words = {b"The": 1, b" The": 2, b"Th": 3, b"the": 4, b" the": 5, b"Anna": 6, b" Anna": 7, b"OK": 8, b" OK": 9}
    found = start_words(words, 5, 0).tolist()
    assert sorted(found[:2]) == sorted(found[2:4]) == [1, 6]
    assert start_words(words, 3, 0).tolist() == found[:3]
    assert {tuple(start_words(words, 4, seed)) for seed in range(20)} > {tuple(found[:4])}
    assert set(start_words({b"ab": 1, b"c1": 2, b"\xff": 3}, 4, 0).tolist()) == {1}
    assert set(start_words({b"1": 1, b" ": 2}, 4, 0).tolist()) == {1, 2}
    assert set(start_words({"Él".encode(): 1, " Él".encode(): 2, b"xy": 3}, 2, 0).tolist()) == {1}


def test_written_probes_name_their_base_seed_and_temperature(base, tmp_path, monkeypatch):
    monkeypatch.setenv("JCROSSLORA_CACHE", str(tmp_path))
    probes = written_probes(base, 2, length=LENGTH, temperature=HOT, seed=9)
    assert list(probes.texts) == write_texts(base, TextSettings(2, LENGTH, HOT, 9))
    assert base.name in probes.describe()
    assert "seed 9" in probes.describe()
    assert "temperature 20" in probes.describe()
    assert written_probes(base, 2, length=LENGTH, temperature=HOT, seed=9) == probes  # from the disk


def test_matched_tokens_of_two_tokenizers_spell_the_same_text(tmp_path):
    src, tgt = (
        load_tokenizer(open_base(write_base(tmp_path / str(merges), merges, bos=bos)))
        for merges, bos in ((40, False), (150, True))
    )
    text = "The dog said naïve things to Zürich — and ‘Water’ boils. " * 2
    (one,) = probe_batches([text], (src, tgt), batch=1)
    at_src, at_tgt = one.at_src[one.valid], one.at_tgt[one.valid]
    assert len(at_src) > 30
    for i, j in zip(at_src, at_tgt, strict=True):
        left, right = src.decode(one.tokens_src[0, : i + 1]), tgt.decode(one.tokens_tgt[0, : j + 1])
        assert left == right
        assert text.startswith(left)
    assert at_src.min() >= 1
    assert one.tokens_tgt[0, 0] == tgt.bos
    assert at_tgt.min() >= 1
