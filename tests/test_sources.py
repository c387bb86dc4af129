"""The three kinds of sources on one tiny base: they write the same and predict the same."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from probe_bases import CORPUS, chat_base
from source_server import BASE, MODEL, serving
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora import ServedModel, TorchModel
from jcrosslora.checkpoint import pad_right
from jcrosslora.decoder import forward, load_model, logits
from jcrosslora.distill.batches import make_batches
from jcrosslora.distill.output_columns import EosTokens, find_columns
from jcrosslora.distill.sources.decoder import DecoderSource, RestrictedModel
from jcrosslora.distill.sources.predictions import TopTokens, divergence, spread
from jcrosslora.distill.sources.served import ServedSource
from jcrosslora.distill.teacher import Teacher
from jcrosslora.distill.templates import compare
from jcrosslora.text import Completion, Message

KEY = jax.random.key(0)
PROMPTS = ["Water boils at", "Anna", (Message("user", "What jumps?"),), "When does the sun"]
ANSWERS = [
    Completion("Q: Who said that?\nA:", " Anna and Peter"),
    Completion("Water boils at", " 100 degrees."),
    Completion((Message("user", "What jumps?"),), "a dog"),
]
KINDS = ("decoder", "torch", "vllm", "llamacpp")


def softened(base):
    """The same base with less certain predictions: random weights are sure of everything they say."""
    path = base.path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors | {"model.norm.weight": 0.2 * tensors["model.norm.weight"]}, path)
    return jcl.open_base(base.path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    base = softened(chat_base(folder / "base"))
    adapter = random_adapter(base, scale=0.3)
    jcl.save_adapter(adapter, folder / "adapter", base=base, profile="peft")
    return base, adapter, folder / "adapter"


@pytest.fixture(scope="module")
def decoder(pair):
    return DecoderSource.of(*pair[:2], model=load_model(pair[0]))


@pytest.fixture(scope="module", params=KINDS)
def source(request, pair, decoder):
    base, adapter, path = pair
    if request.param == "decoder":
        yield decoder
    elif request.param == "torch":
        pytest.importorskip("peft")
        from jcrosslora.distill.sources.torch import TorchSource

        yield TorchSource.open(TorchModel(base.path, device="cpu"), path)
    else:
        with serving(base, adapter, request.param) as server:
            yield ServedSource.open(ServedModel(server.url, MODEL, base.path, top_logprobs=base.dims.vocab))


def said(written):
    return [(one.text, one.ended) for one in written]


def test_all_write_the_same(source, decoder):
    for one, other in ((source, decoder), (source.alone(), decoder.alone())):
        assert said(one.write(PROMPTS, 6, 0.0, KEY)) == said(other.write(PROMPTS, 6, 0.0, KEY))
    assert source.alone().write(PROMPTS, 6, 0.0, KEY) != source.write(PROMPTS, 6, 0.0, KEY)


@pytest.mark.full
def test_all_sample_from_the_model(source, decoder):
    often = ["Anna"] * 200
    found = {one.text for one in source.write(often, 1, 1.0, KEY)}
    assert len(found) > 20
    assert source.write(often[:20], 1, 1.0, KEY) == source.write(often[:20], 1, 1.0, KEY)
    assert source.write(often[:20], 1, 1.0, KEY) != source.write(often[:20], 1, 1.0, jax.random.key(1))


def test_all_amplify_the_change_of_the_adapter(source, decoder):
    loud, wanted = (one.amplified(2.0, 1e-3).write(PROMPTS[:2], 4, 0.0, KEY) for one in (source, decoder))
    assert said(loud) == said(wanted) != said(decoder.write(PROMPTS[:2], 4, 0.0, KEY))


def test_all_compare_alike(source, decoder):
    for found, wanted in zip(compare(source, ANSWERS, 4), compare(decoder, ANSWERS, 4), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-5)


def test_answers_in_texts_of_any_width_are_compared(decoder):
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 60, length).astype(np.int32) for length in (120, 5, 33, 50, 128, 70, 90, 16, 81)]
    found = decoder.compare(texts, [len(text) - 4 for text in texts], 3)
    tokens, mask = pad_right(texts, (len(texts), 128))
    rows = np.arange(len(texts))[:, None]
    at = np.array([len(text) for text in texts])[:, None] + np.arange(-4, -1)

    def predicted(adapter):
        states = forward(decoder.model.with_adapter(adapter), tokens, mask=mask).hidden[rows, at - 1]
        return jax.nn.log_softmax(logits(decoder.model, states))

    adapted, base = predicted(decoder.model.adapter), predicted(None)
    told = rows, np.arange(3), tokens[rows, at]
    wanted = jnp.sum(jnp.exp(adapted) * (adapted - base), axis=-1), -base[told], -adapted[told]
    for values, own in zip(found, wanted, strict=True):
        np.testing.assert_allclose(values, jnp.mean(own, axis=1), rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module")
def lesson(pair, decoder, tmp_path_factory):
    """Batches, columns and a reduced target for the source, whose end has two tokens."""
    base = pair[0]
    target = jcl.open_base(base.path)
    often = dataclasses.replace(decoder.tokenizer, stops=(1, 5))
    texts = [Completion(text, " and water") for text in CORPUS[:4]]
    batches = make_batches(texts, (often, often), 1.0)
    columns = find_columns(base, target, batches, 400, EosTokens(((1, 5), (1, 5)), ((1, 5), (1,))))
    other = DecoderSource.of(target)
    reduced = RestrictedModel.of(other.model, columns.head_rows(1), 1)
    return batches, columns, reduced


def sides(source, lesson):
    batches, columns, target = lesson
    reader = source.reader(columns.head_rows(0), 2)
    return Teacher(reader, target, columns, (0.5, 1.0, 0.25)).sides(batches[0])


def test_all_predict_the_same_columns(source, decoder, lesson):
    used = lesson[0][0].weight > 0
    for found, wanted in zip(sides(source, lesson)[1:], sides(decoder, lesson)[1:], strict=True):
        np.testing.assert_allclose(np.asarray(found)[used], np.asarray(wanted)[used], rtol=2e-3, atol=2e-3)


def test_all_name_themselves(source):
    json.dumps(source.identity())
    assert source.vocabulary().tokens
    assert source.name
    assert source.ref


@pytest.mark.parametrize(("kind", "top"), [("vllm", 3), ("vllm", 40), ("sglang", 40), ("other", 40)])
def test_known_columns_keep_their_probabilities(pair, decoder, lesson, kind, top):
    """But for a factor, since some tokens are no column; a server that names tokens by their text leaves some out."""
    base, adapter, _ = pair
    with serving(base, adapter, kind) as server:
        source = ServedSource.open(ServedModel(server.url, MODEL, base.path, BASE, top_logprobs=top))
        taught, *some = sides(source, lesson)
    batches, columns, _ = lesson
    _, *full = sides(decoder, lesson)
    used, end = np.flatnonzero(batches[0].weight > 0), len(columns.shared[1]) + len(columns.own[1])
    bytes_alone = [bool("\ufffd" in decoder.tokenizer.decode([token])) for token in columns.head_rows(1)[:end]]
    for found, wanted in zip(some, full, strict=True):
        found, wanted = np.asarray(found, np.float64)[used, :end], np.asarray(wanted, np.float64)[used, :end]
        for row, (one, other) in enumerate(zip(found, wanted, strict=True)):
            likely = [column for column in np.argsort(-other)[: top - 2] if kind == "vllm" or not bytes_alone[column]]
            assert np.ptp((one - other)[likely]) < 2e-3, row
    for one in (taught.teacher, *some):
        np.testing.assert_allclose(np.exp(np.asarray(one, np.float64)).sum(axis=1), 1, rtol=1e-5)


def test_the_rest_of_the_mass_goes_where_the_target_puts_it():
    rng = np.random.default_rng(0)
    full, own = (np.asarray(jax.nn.log_softmax(jnp.asarray(rng.normal(size=(7, 50)), jnp.float32))) for _ in range(2))
    order = np.argsort(-full, axis=1)
    apart = []
    for top in (5, 20, 50):
        known = np.full_like(full, -np.inf)
        np.put_along_axis(known, order[:, :top], np.take_along_axis(full, order[:, :top], 1), 1)
        rest = np.log(np.maximum(1e-9, 1 - np.exp(known).sum(axis=1)))
        bound = np.take_along_axis(full, order[:, top - 1 : top], 1)[:, 0]
        found = np.asarray(spread(*map(jnp.asarray, (known, rest, bound, own))), np.float64)
        for row in range(7):
            others = order[row, top:]
            shares = np.exp(own[row, others]) / np.exp(own[row, others]).sum() * np.exp(rest[row])
            wanted = np.exp(known[row])
            wanted[others] = np.minimum(shares, np.exp(bound[row]))
            np.testing.assert_allclose(np.exp(found[row]), wanted / wanted.sum(), rtol=1e-4, atol=1e-8)
        apart.append((np.exp(full) * (full - found)).sum(axis=1).mean())
    assert apart[0] > apart[1] > 0.01 > abs(apart[2])


def test_the_divergence_of_known_tokens_is_that_of_all_at_most():
    rng = np.random.default_rng(0)
    one, other = (np.log(rng.dirichlet(np.full(60, 0.3), 40).astype(np.float64) + 1e-9) for _ in range(2))
    wanted = (np.exp(one) * (one - other) - np.exp(one) + np.exp(other)).sum(axis=1)

    def known(row, top, told=None):
        found = {int(index): float(row[index]) for index in np.argsort(-row)[:top]}
        return TopTokens.of(found, -np.inf, told)

    whole = [divergence(known(a, 60), known(b, 60)) for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(whole, wanted, rtol=1e-6)
    some = np.array([divergence(known(a, 20), known(b, 20)) for a, b in zip(one, other, strict=True)])
    assert (some < wanted).mean() > 0.9
    assert some.mean() > 0.3 * wanted.mean()
    told = known(one[0], 5, (int(np.argmin(one[0])), float(one[0].min())))
    assert told.log_prob(int(np.argmin(one[0]))) == one[0].min()
    assert told.bound == np.sort(one[0])[-5]
