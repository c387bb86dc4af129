"""The fit to predictions: its parts against brute force, and the whole on tiny bases."""

import dataclasses
import io
import json
import re
import shutil
import time
from contextlib import closing
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
import safetensors.numpy
from command_line import main
from full_disk import fill_disk
from full_set import full_except
from probe_bases import CORPUS, chat_base, write_base
from rich.console import Console
from tiny_bases import delta, random_adapter
from transfers import move_files, transfer_settings
from whole_passes import log_probs

import jcrosslora as jcl
from jcrosslora import transfer_files
from jcrosslora.architectures.blocks import DENSE_ROLES
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import (
    Model,
    Written,
    forward,
    load_model,
    logits,
    stack_adapter,
)
from jcrosslora.distill import TEMPLATES, DistillSettings, PromptTemplate, distillation, templates_of
from jcrosslora.distill import completions as completions_module
from jcrosslora.distill import fit as fit_module
from jcrosslora.distill import settings as settings_module
from jcrosslora.distill import teacher as teacher_module
from jcrosslora.distill import templates as templates_module
from jcrosslora.distill.batches import FIT_ROWS, make_batches
from jcrosslora.distill.completions import (
    PILOT,
    TEMPLATE_TOKENS,
    answer_given,
    answer_length,
    write_completions,
)
from jcrosslora.distill.fit import Fit, first_state, gradient_step, needs_remat, schedule
from jcrosslora.distill.judge import Judge, mean_kl
from jcrosslora.distill.output_columns import EosTokens, find_columns
from jcrosslora.distill.run import distill
from jcrosslora.distill.settings import ROUND, USUAL
from jcrosslora.distill.sources import Compared
from jcrosslora.distill.sources.decoder import DecoderReader, DecoderSource, RestrictedModel, shared_log_probs
from jcrosslora.distill.teacher import TaughtBatch, Teacher, mix_teacher, weighted_kl
from jcrosslora.distill.templates import Sampler, first_sentence, in_template, judge_templates, known_templates
from jcrosslora.errors import AdapterError, CheckpointError, MethodError, UsageError
from jcrosslora.methods import METHODS
from jcrosslora.report import complete, model_card, print_report, published, shorten
from jcrosslora.text import Completion, Message, read
from jcrosslora.text.reading import PLAIN_TEMPLATE
from jcrosslora.training.checkpoints import Checkpoints
from jcrosslora.utils.picking import pick_evenly

SMALL = DistillSettings(
    fit_rank=4,
    passes=1,
    rate=1e-2,
    completions=48,
    answer_tokens=6,
    discovery=0,
    compared_tokens=400,
    teacher_weight=0.0,
    sure_weight=0.0,
    contrast_weight=1.0,
)


class Parrot(DecoderSource):
    """A generator that always writes the same, and ends it."""

    says: ClassVar[str] = " a dog"

    def write(self, prompts, *_, **__):
        return [Written(self.says, 5, True)] * len(prompts)


class Silent(Parrot):
    says: ClassVar[str] = ""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    source = jcl.open_base(write_base(folder / "source", 30, bos=True, layers=2))
    target = jcl.open_base(write_base(folder / "target", 90, layers=2, hidden=32, head_dim=8, seed=1))
    return source, target, random_adapter(source, scale=0.3)


def test_the_teacher_mixes_target_and_source_and_adds_the_sources_change():
    rng = np.random.default_rng(0)
    own, base, adapted = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(5, 11)), jnp.float32)) for _ in range(3))
    np.testing.assert_allclose(mix_teacher(own, base, adapted, 0.0, 0.0, 0.0), own, atol=1e-6)
    np.testing.assert_allclose(mix_teacher(own, base, adapted, 1.0, 1.0, 0.0), adapted, atol=1e-5)
    np.testing.assert_allclose(mix_teacher(base, base, adapted, 0.0, 0.0, 1.0), adapted, atol=1e-5)
    found = np.asarray(mix_teacher(own, base, adapted, 0.25, 0.25, 0.5))
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)
    raw = np.asarray(0.75 * own + 0.25 * adapted + 0.5 * (adapted - base))
    np.testing.assert_allclose(found - found[:, :1], raw - raw[:, :1], atol=1e-5)
    kl, weight = weighted_kl(own, adapted, jnp.asarray([1.0, 2, 0, 0, 0.5]))
    by_row = np.sum(np.exp(own) * (np.asarray(own) - np.asarray(adapted)), -1)
    np.testing.assert_allclose(kl, by_row[0] + 2 * by_row[1] + 0.5 * by_row[4], rtol=1e-5)
    assert weight == 3.5


@pytest.mark.full
def test_remat_gives_the_same_step(pair):
    base = pair[1]
    target = RestrictedModel(load_model(base))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 90, (8, 64)), jnp.int32)
    teacher = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(5, base.dims.vocab)), jnp.float32))
    read = TaughtBatch(tokens, jnp.ones((8, 64), bool), jnp.asarray([2, 3, 99, 300, 511]), jnp.ones(5), teacher)
    given = target, first_state(target.model, SMALL), read, jnp.float32(1e-2)
    found = [gradient_step(*given, remat=remat).factors for remat in (False, True)]
    for kept, again in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(again, kept, rtol=1e-3, atol=1e-4)


def test_memory_of_a_base_of_8b_parameters(pair):
    """As XLA's memory analysis has it, without a number of it being made: without remat too much."""
    layers, hidden, inner, heads, kv_heads, vocab = 32, 4096, 14336, 32, 8, 6500
    few = load_model(pair[1], jnp.bfloat16)
    small = few.settings
    widths = dict(hidden=hidden, intermediate=inner, heads=heads, kv_heads=kv_heads, head_dim=128, vocab=vocab)
    ropes = tuple(dataclasses.replace(rope, frequencies=(1.0,) * 64) for rope in small.ropes)
    mixer = dataclasses.replace(small.stack[0].mixer, hidden=hidden, heads=heads, kv_heads=kv_heads, size=128)
    mlp = dataclasses.replace(small.stack[0].mlp, hidden=hidden, width=inner)
    stack = (dataclasses.replace(small.stack[0], mixer=mixer, mlp=mlp),) * layers
    each = dict(windows=(None,) * layers, layer_ropes=(0,) * layers, ropes=ropes, stack=stack)
    large = dataclasses.replace(small, layers=layers, **widths, **each)
    outputs = {"k_proj": 1024, "v_proj": 1024, "gate_proj": inner, "up_proj": inner}

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    params = dataclasses.replace(
        few.params,
        embedding=array(vocab, hidden, dtype=jnp.bfloat16),
        final_norm=array(hidden),
        weights={
            role: array(layers, outputs.get(role, hidden), inner if role == "down_proj" else hidden, dtype=jnp.uint16)
            for role in few.params.weights
        },
        norms={name: array(layers, hidden) for name in few.params.norms},
    )
    target = RestrictedModel(Model(large, params))
    state = jax.eval_shape(lambda model: first_state(model, DistillSettings()), target.model)
    tokens, places = (FIT_ROWS, 192), 256
    read = TaughtBatch(
        array(*tokens, dtype=jnp.int32),
        array(*tokens, dtype=jnp.bool_),
        array(places, dtype=jnp.int32),
        array(places),
        array(places, vocab),
    )
    given = target, state, read, array()
    kept, again = (
        gradient_step.lower(*given, remat=remat).compile().memory_analysis().temp_size_in_bytes
        for remat in (False, True)
    )
    assert needs_remat(large, tokens)
    assert 4e9 < kept < 8e9
    assert again < 4e9


@pytest.mark.full
def test_large_bases_are_fitted_with_remat(beginning, monkeypatch):
    teacher, batches, held_out = beginning
    small = teacher.target.model.settings
    large = dataclasses.replace(small, layers=32, hidden=4096, intermediate=14336, heads=32, head_dim=128)
    assert [needs_remat(model, (FIT_ROWS, 192)) for model in (small, large)] == [False, True]
    seen, step = [], fit_module.gradient_step
    monkeypatch.setattr(fit_module, "needs_remat", lambda *_: True)
    monkeypatch.setattr(
        fit_module,
        "gradient_step",
        lambda *given, remat, **more: seen.append(remat) or step(*given, remat=False, **more),
    )
    Fit(teacher, Judge(held_out), SMALL, begun=time.monotonic()).run(batches, lambda *_: [])
    assert set(seen) == {True}


def test_where_little_memory_is_free_a_fit_keeps_less_and_comes_to_the_same(beginning, monkeypatch):
    teacher, batches, held_out = beginning
    seen, step, read = [], fit_module.gradient_step, []

    def noted(*given, remat):
        seen.append(remat)
        return step(*given, remat=remat)

    monkeypatch.setattr(fit_module, "gradient_step", noted)
    counted = SimpleNamespace(target=teacher.target, read=lambda batch: read.append(batch) or teacher.read(batch))
    found, settings, steps_taken = [], dataclasses.replace(SMALL, passes=2), 2 * len(batches)
    for free, kept in ((None, len(batches)), (0, steps_taken)):
        monkeypatch.setattr(fit_module, "free_memory", lambda free=free: free)
        seen.clear()
        read.clear()
        found.append(Fit(counted, Judge(held_out), settings, begun=time.monotonic()).run(batches, lambda *_: []))
        assert seen == [free == 0] * steps_taken
        assert len(read) == kept
    for one, other in zip(*(jax.tree.leaves(each.adapter) for each in found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_batches_weigh_answers_and_have_few_shapes(pair):
    source, target, _ = pair
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    items = [
        Completion("Anna said ", "that Plants need Water."),
        Completion("Water boils at 100 degrees. " * 9, "Where?"),
    ]
    found = [make_batches([item], tokenizers, 0.25)[0] for item in items]
    for batch, item in zip(found, items, strict=True):
        assert batch.tokens_src.shape[0] == min(FIT_ROWS, 384 // batch.tokens_tgt.shape[1])
        reading = read(tokenizers[0], item)
        matched = (batch.weight > 0) & (batch.at_src > 0)
        rows, places = np.divmod(batch.at_src[matched], batch.tokens_src.shape[1])
        assert set(rows) == {0}
        inside = places < reading.answer - 1
        assert set(batch.weight[matched][inside]) == {np.float32(0.25)}
        assert set(batch.weight[matched][~inside]) == {np.float32(1)}
        np.testing.assert_array_equal(batch.answer[matched], ~inside)
        assert places.max() == len(reading.ids) - 1
    src, tgt = find_columns(source, target, found, 5).shared
    words_src, words_tgt = source.vocabulary().tokens, target.vocabulary().tokens
    by_id = {index: token for token, index in words_tgt.items()}
    assert [words_src[by_id[int(index)]] for index in tgt] == src.tolist()


def test_texts_of_a_batch_are_of_like_length_and_each_side_has_its_width(pair):
    tokenizers = load_tokenizer(pair[0]), load_tokenizer(pair[1])
    items = [Completion("Water boils. " * count, "Where?") for count in (1, 6, 1, 7, 1, 6, 1, 6, 1) for _ in range(8)]
    found = make_batches(items, tokenizers, 1.0)
    assert sum(batch.rows for batch in found) == len(items)
    for batch in found:
        counts = [mask.sum(axis=1)[mask.any(axis=1)] for mask in (batch.mask_src, batch.mask_tgt)]
        for count, tokens in zip(counts, (batch.tokens_src, batch.tokens_tgt), strict=True):
            assert count.max() <= tokens.shape[1]
        assert counts[1].max() - counts[1].min() < 16
    shapes = {(batch.tokens_src.shape, batch.tokens_tgt.shape, len(batch.weight)) for batch in found}
    assert len(shapes) == len({batch.tokens_tgt.shape for batch in found}) == 2


def test_how_texts_are_batched_changes_no_prediction(teaching):
    make, batches = teaching
    teacher = make(SMALL)
    student = teacher.target.with_adapter(first_state(teacher.target.model, SMALL).factors)

    def divergence(parts):
        return mean_kl(student, [teacher.read(batch) for batch in parts])

    rows, width = batches[0].tokens_tgt.shape
    padded = [(0, 0), (0, 24)]
    at = batches[0].at_tgt
    wider = dataclasses.replace(
        batches[0],
        tokens_tgt=np.pad(batches[0].tokens_tgt, padded),
        mask_tgt=np.pad(batches[0].mask_tgt, padded),
        at_tgt=at + 24 * (at // width),
    )
    assert wider.tokens_tgt.shape == (rows, width + 24)
    assert divergence([wider]) == pytest.approx(divergence(batches[:1]), rel=1e-5)


@pytest.mark.parametrize("dtype", full_except([jnp.float32, jnp.bfloat16], [jnp.bfloat16]))
def test_the_fit_brings_predictions_towards_the_teacher(pair, monkeypatch, dtype):
    source, target, adapter = pair
    monkeypatch.setattr("jcrosslora.distill.run.fast_dtype", lambda: dtype)
    found = distill(source, target, adapter, prompts=CORPUS, settings=SMALL)
    assert found.curve[-1].divergence < 0.97 * found.curve[0].divergence
    assert [point.completions for point in found.curve] == sorted(point.completions for point in found.curve)
    roles = {name.rpartition(".")[2] for name in found.adapter.modules}
    assert roles == set(DENSE_ROLES)
    again = distill(source, target, adapter, prompts=CORPUS, settings=SMALL)
    for name, factors in found.adapter.modules.items():
        np.testing.assert_array_equal(factors.a, again.adapter.modules[name].a)


@pytest.mark.full
def test_a_fit_continues_from_a_given_start(pair):
    source, target, adapter = pair
    begun = random_adapter(target, roles=("v_proj", "up_proj"), rank=2, scale=1e-3)
    found = distill(source, target, adapter, begun, prompts=CORPUS, settings=SMALL)
    start = stack_adapter(begun, target)
    again = stack_adapter(found.adapter, target)
    assert again.roles["v_proj"].a.shape[1] == 2 + SMALL.fit_rank
    np.testing.assert_allclose(again.roles["v_proj"].a[:, :2], start.roles["v_proj"].a)
    np.testing.assert_allclose(again.roles["up_proj"].b[:, :, :2], start.roles["up_proj"].b)


@pytest.mark.slow
def test_no_update_has_more_rank_than_its_module(pair):
    source, target, adapter = pair
    wide = dataclasses.replace(SMALL, fit_rank=500)
    found = distill(source, target, adapter, prompts=CORPUS, settings=wide)
    assert found.curve[-1].divergence < found.curve[0].divergence
    for name, factors in found.adapter.modules.items():
        assert factors.rank == min(target.modules[name].shape)


@pytest.mark.slow
def test_an_adapter_of_zeros_has_nothing_to_find(pair):
    source, target, adapter = pair
    modules = {name: dataclasses.replace(item, b=np.zeros_like(item.b)) for name, item in adapter.modules.items()}
    with pytest.raises(jcl.MethodError, match="no update that is better than none"):
        distill(source, target, jcl.Adapter(modules), prompts=CORPUS, settings=SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 0.0},
        {"roles": ("v_proj", "lm_head")},
        {"held_out": 1.0},
        {"fit_rank": 0},
        {"teacher_weight": 1.5},
        {"sure_weight": -0.1},
        {"contrast_weight": float("nan")},
        {"completions": 15},
        {"prompt_weight": float("nan")},
        {"answer_temperature": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(pair, change):
    source, target, adapter = pair
    with pytest.raises(UsageError, match="asked for"):
        distill(source, target, adapter, prompts=CORPUS, settings=dataclasses.replace(SMALL, **change))


def test_a_seed_out_of_range_is_refused(pair):
    source, target, adapter = pair
    with pytest.raises(UsageError, match="seed -1 was asked for"):
        distill(source, target, adapter, prompts=CORPUS, settings=SMALL, seed=-1)


def test_answers_to_a_single_prompt_are_refused(pair):
    source, target, adapter = pair
    with pytest.raises(MethodError, match="answered one and the same prompt, 2 different ones are needed"):
        distill(source, target, adapter, prompts=["Anna said"] * 3, settings=SMALL)


def test_the_first_prompts_are_used_where_there_are_more_than_answers(pair):
    source, _, adapter = pair
    generator = Parrot.of(source, adapter)
    prompts = [f"Anna said {number}" for number in range(30)]
    found = answer_given(generator, generator.alone(), prompts, Sampler(20))
    assert [item.prompt for item in found.items] == prompts[:20]
    facts = found.facts
    assert (facts.answers, facts.ended, facts.answer_tokens, facts.answered, facts.given) == (20, 20, 5, 20, 30)
    all_used = answer_given(generator, generator.alone(), prompts, Sampler(60))
    assert (all_used.facts.answers, all_used.facts.answered, all_used.facts.written) == (60, 30, 0)


def test_long_prompts_are_read_from_their_end_and_counted(pair):
    source, target, adapter = pair
    generator = Parrot.of(source, adapter)
    prompts = ["Anna said " * 1500 + "Where?", "Water boils at"]
    found = answer_given(generator, generator.alone(), prompts, Sampler(16))
    assert (found.facts.given, found.facts.shortened) == (2, 1)
    assert {item.prompt for item in found.items} == set(prompts)
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    (batch,) = make_batches(found.items[:1], tokenizers, 1.0)
    assert batch.tokens_src.shape == (1, 2560)
    whole = read(tokenizers[0], found.items[0]).ids
    end = int(batch.mask_src[0].sum())
    # The token that begins a text stays in front.
    np.testing.assert_array_equal(batch.tokens_src[0, :end], [tokenizers[0].bos, *whole[1 - end :]])
    matched = (batch.at_src > 0) & (batch.next_src >= 0)
    np.testing.assert_array_equal(batch.tokens_src[0, batch.at_src[matched] + 1], batch.next_src[matched])


@pytest.mark.parametrize(
    ("lengths", "ended", "wanted"),
    [([], [], None), ([5] * 19 + [50], [True] * 20, 8), ([5, 5, 9], [True, False, False], None), ([7], [True], 7)],
)
def test_the_length_of_answers_is_a_percentile_of_those_of_a_pilot(lengths, ended, wanted):
    assert answer_length(lengths, ended) == wanted


@pytest.mark.parametrize(("long", "most"), [(9, [64, 9]), (200, [64, 512, 200]), (900, [64, 512, 16])])
def test_answers_that_do_not_end_soon_are_looked_at_again(pair, long, most):
    asked = []

    class Slow(DecoderSource):
        def write(self, prompts, most, *_, **__):
            asked.append(most)
            return [Written(" a dog", min(most, long), most >= long)] * len(prompts)

    prompts = [f"Anna said {number}" for number in range(20)]
    slow = Slow.of(pair[0], pair[2])
    answer_given(slow, slow.alone(), prompts, Sampler(16))
    assert asked == most


def test_a_base_without_answers_is_refused(pair):
    generator = Silent.of(pair[0], pair[2])
    with pytest.raises(MethodError, match=r"answered 0 prompts.*--prompts"):
        answer_given(generator, generator.alone(), CORPUS, Sampler(48, 6))
    with pytest.raises(MethodError, match="answered 0 prompts"):
        write_completions(generator, generator.alone(), Sampler(48, 6), 0)


@pytest.mark.parametrize("prompts", [(), CORPUS], ids=["its own", "given"])
def test_an_adapter_that_is_too_large_is_named_before_the_fit(pair, prompts, monkeypatch):
    source, target, _ = pair
    monkeypatch.delattr("jcrosslora.distill.distillation.Fit")
    with pytest.raises(AdapterError, match=f"gives predictions that are not finite on {source.ref}: its factors, or"):
        distill(source, target, random_adapter(source, scale=1e30), prompts=prompts, settings=SMALL)


def test_a_fit_that_finds_nothing_says_what_to_do(pair):
    source, target, adapter = pair
    with pytest.raises(MethodError, match=r"no update that is better than none .*: give more prompts"):
        distill(source, target, adapter, prompts=CORPUS, settings=dataclasses.replace(SMALL, rate=1e-30))


def test_a_base_without_finite_predictions_is_named(pair):
    source, _, _ = pair
    model = load_model(source)
    params = dataclasses.replace(model.params, head=model.params.output_head * jnp.inf)
    generator = DecoderSource.of(source, model=dataclasses.replace(model, params=params))
    with pytest.raises(CheckpointError, match=f"{source.ref}: gives predictions that are not finite: its weights"):
        generator.continue_texts(["a text"], 4, 1.0, jax.random.key(0))


@pytest.mark.full
def test_a_target_without_finite_predictions_is_named(pair, tmp_path):
    source, _, adapter = pair
    folder = write_base(tmp_path / "target", 90, layers=2, seed=1)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{folder}: gives predictions that are not finite"):
        distill(source, jcl.open_base(folder), adapter, prompts=CORPUS, settings=SMALL)


def test_completions_are_written_in_the_templates_that_the_adapter_knows(pair, monkeypatch):
    templates = [TEMPLATES[place] for place in (1, 7, 5)]
    known, large = set(templates[:2]), set(templates)
    counted, named = [], {template.name: template for template in TEMPLATES}

    def compare(generator, completions, tokens):
        found = [named[item.origin] for item in completions]
        assert tokens == TEMPLATE_TOKENS
        counted.append(len(found))
        assert set(found) == set(TEMPLATES)
        change = np.array([4.0 if template in large else 1.0 for template in found])
        # Completions differ by more than templates do.
        each = len(found) // len(set(found))
        noise = np.random.default_rng(0).normal(size=each)[np.arange(len(found)) % each]
        nll = np.array([2.0 if template in known else 2.1 for template in found]) + noise
        return Compared(change, nll, nll)

    text = " is the first of all things? And more\nthan that"
    monkeypatch.setattr(templates_module, "compare", compare)

    class Fluent(Parrot):
        says = text

    generator = Fluent.of(pair[0])
    found = write_completions(generator, generator.alone(), Sampler(100), 0)
    assert len(found.items) == 100
    assert counted == [PILOT * len(TEMPLATES) ** 2]
    assert {named[item.origin] for item in found.items} == known
    assert all(item.prompt.startswith(named[item.origin].before) for item in found.items)
    assert all(item.prompt.endswith("?" + named[item.origin].after) for item in found.items)
    assert set(found.facts.templates) == {template.name for template in known}
    few = write_completions(generator, generator.alone(), Sampler(20), 0).items
    assert len(few) == 20
    assert {named[item.origin] for item in few} == known


def test_known_templates_are_those_with_the_largest_change_beyond_the_base_nll():
    def known(*figures):
        return [TEMPLATES.index(template) for template in known_templates(TEMPLATES, *figures)]

    completions = np.random.default_rng(0).normal(size=50)
    change = np.array([4.0, 6.0, 2.0, 4.0, 3.9])[:, None] * np.ones(50)
    # 1 changes most, but its answers are least likely, and those of 2 most; completions differ by more than templates.
    base_nll = np.array([2.0, 4.3, 1.0, 2.1, 2.0])[:, None] + completions
    assert known(change, base_nll) == [0]
    noise = np.random.default_rng(1).normal(size=(5, 50))
    noise -= noise.mean(axis=1)[:, None]
    noisy = base_nll + 0.5 * noise * (np.arange(5) > 2)[:, None]
    assert known(change, noisy) == [0, 3, 4]
    # At most three, the best ones.
    assert known(change, base_nll + 10 * noise) == [0, 3, 4]
    assert known(change[[4, 0]], base_nll[[4, 0]]) == [1]
    # An adapter without effect knows no template better than another.
    assert known(0 * change, 0 * base_nll) == [0, 1, 2]
    assert known(change[:, :0], base_nll[:, :0]) == []
    assert known(np.full_like(change, np.nan), base_nll) == []


def test_templates_are_judged_on_the_same_completions(pair, monkeypatch):
    told = [Completion(f"Q: {number}?\nA:", " it is", origin=TEMPLATES[1].name) for number in range(5)]
    names = [template.name for template in TEMPLATES]

    def compare(generator, completions, tokens):
        numbers = np.array([int(re.search(r"\d+", item.prompt).group()) for item in completions], float)
        return Compared(numbers, np.array([float(names.index(item.origin)) for item in completions]), numbers)

    monkeypatch.setattr(templates_module, "compare", compare)
    change, base_nll = judge_templates(DecoderSource.of(pair[0]), told, 5)
    np.testing.assert_array_equal(change, np.tile(np.arange(5.0), (len(TEMPLATES), 1)))
    np.testing.assert_array_equal(base_nll, np.tile(np.arange(8.0)[:, None], (1, 5)))


def test_the_chat_template_of_a_base_is_one_of_the_templates(tmp_path):
    base = chat_base(tmp_path / "base")
    tokenizer = load_tokenizer(base)
    *plain, chat = templates_of(tokenizer)
    assert tuple(plain) == TEMPLATES
    assert chat.wrap("Who?") == (Message("user", "Who?"),)
    # bos is put in front of a text that is to be continued.
    assert (chat.before, chat.after) == ("user: ", "</s>assistant: ")
    first = Completion("Question: What is it?\nAnswer:", " a dog", origin=TEMPLATES[0].name)
    moved = in_template(first, TEMPLATES[0], chat)
    assert moved == Completion((Message("user", "What is it?"),), "a dog", origin=chat.name)
    assert in_template(moved, chat, TEMPLATES[0]) == first
    assert templates_of(load_tokenizer(jcl.open_base(write_base(tmp_path / "plain", 30)))) == TEMPLATES


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_a_completion_is_put_into_another_template_and_back(template: PromptTemplate):
    first = Completion("Question: What is it?\nAnswer:", " a dog", origin=TEMPLATES[0].name)
    moved = in_template(first, TEMPLATES[0], template)
    assert moved.prompt == f"{template.before}What is it?{template.after}"
    assert moved.answer == ("a dog" if template.after.endswith("\n") else " a dog")
    assert in_template(moved, template, TEMPLATES[0]) == first


@pytest.mark.slow
def test_an_adapter_is_fitted_in_the_chat_template_of_each_base(tmp_path):
    source = chat_base(tmp_path / "source")
    target = jcl.open_base(write_base(tmp_path / "target", 90, layers=2, hidden=32, head_dim=8, seed=1, eos=1))
    given = [(Message("user", text),) for text in CORPUS]
    found = distill(source, target, random_adapter(source, scale=0.3), prompts=given, settings=SMALL)
    assert found.curve[-1].divergence < found.curve[0].divergence


@pytest.mark.slow
def test_an_adapter_is_moved_in_its_own_chat_template(tmp_path):
    source = chat_base(tmp_path / "source")
    target = jcl.open_base(write_base(tmp_path / "target", 90, layers=2, hidden=32, head_dim=8, seed=1, eos=1))
    jcl.save_adapter(random_adapter(source, scale=0.3), tmp_path / "adapter")
    lines = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]} for text in CORPUS
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    places = tmp_path / "adapter", source.path, target.path
    given = {"method": "distill", "fit_rank": 4, "completions": 24, "answer_tokens": 4}
    given["prompts"] = str(prompts)
    plain = move_files(*places, tmp_path / "one", **given, effect="never")
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == PLAIN_TEMPLATE
    # The file beside the adapter comes before the base's own template, and a given one before the target's.
    turns = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}[a] "
    )
    (tmp_path / "adapter" / "chat_template.jinja").write_text(turns + "{% endif %}")
    other = move_files(*places, tmp_path / "two", **given, effect="never")
    assert other.texts != plain.texts
    given["target_template"] = str(tmp_path / "adapter" / "chat_template.jinja")
    move_files(*places, tmp_path / "three", **given, effect="never")
    assert (tmp_path / "three" / "chat_template.jinja").read_text() == turns + "{% endif %}"


def test_the_end_of_an_answer_is_one_symbol_of_both_bases(tmp_path):
    source = chat_base(tmp_path / "source")
    target = jcl.open_base(write_base(tmp_path / "target", 90, layers=2, hidden=32, head_dim=8, seed=1, eos=1))
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    item = Completion((Message("user", "Anna said"),), "Water and light")
    whole, cut = (make_batches([dataclasses.replace(item, ended=ended)], tokenizers, 1.0) for ended in (True, False))
    # The token that ends the answer is predicted, and not read.
    np.testing.assert_array_equal(whole[0].tokens_tgt, cut[0].tokens_tgt)
    stops = tokenizers[0].stops, tokenizers[1].stops
    columns = find_columns(source, target, whole, 400, EosTokens(stops, ((1,), (1, 5))))
    ids = columns.head_rows(1)[:-2]
    assert 1 not in columns.shared[0]
    model = load_model(target)
    last = int(whole[0].at_tgt[whole[0].weight > 0].max())
    reduced = RestrictedModel.of(model, columns.head_rows(1), 2)
    read = jnp.asarray(whole[0].tokens_tgt), jnp.asarray(whole[0].mask_tgt), jnp.asarray([last])
    found = shared_log_probs(reduced, *read)
    hidden = forward(model, jnp.asarray(whole[0].tokens_tgt), mask=read[1]).hidden.reshape(-1, 32)[last]
    scores = np.asarray(logits(model, hidden), np.float64)
    both = np.exp(scores[[1, 5]]).sum()
    np.testing.assert_allclose(found[0, -1], np.log(both / (np.exp(scores[ids]).sum() + both)), rtol=1e-4)


@pytest.mark.full
def test_a_writer_is_chosen_where_prompts_are_to_be_written(pair, monkeypatch):
    source, target, adapter = pair
    chosen = []
    monkeypatch.setattr(distillation, "choose_writer", lambda source, target, shared: chosen.append(target) or target)
    few, given = dataclasses.replace(SMALL, completions=16), [f"Anna said {number}" for number in range(16)]
    distill(source, target, adapter, prompts=given, settings=few)
    assert not chosen
    found = distill(source, target, adapter, prompts=given[:12], settings=few)
    (writer,) = chosen
    assert writer.model.adapter is None
    assert writer.name == target.ref
    assert len(found.completions) >= 12


def test_completions_are_compared_each_by_itself(pair):
    source, _, adapter = pair
    tokenizer, model = load_tokenizer(source), load_model(source)
    generator = DecoderSource.of(source, adapter, model=model, tokenizer=tokenizer)
    texts = [("Q: Who said that?\nA:", " Anna and Peter"), ("Water boils at", " 100"), ("Anna said " * 40, " no dog")]
    completions = [Completion(*text) for text in texts] * 3
    figures = templates_module.compare(generator, completions, 3)
    for place, item in enumerate(completions):
        begin = len(tokenizer.encode(item.prompt).ids)
        ids = tokenizer.encode(item.text).ids[: begin + 3]
        cut = ids[-128:]
        tokens = np.arange(begin, len(ids))[:3]
        places = tokens - 1 - (len(ids) - len(cut))
        changed, plain = (log_probs(model, cut, one)[places] for one in (generator.model.adapter, None))
        kl = (np.exp(changed) * (changed - plain)).sum(axis=1)
        np.testing.assert_allclose(figures.change[place], kl.mean(), rtol=1e-3, atol=1e-5)
        for nll, one in ((figures.base_nll, plain), (figures.adapted_nll, changed)):
            np.testing.assert_allclose(nll[place], -one[np.arange(len(places)), ids[tokens]].mean(), rtol=1e-4)
    assert figures.change.min() > 0


def test_answers_are_read_as_far_as_they_are_compared(pair, monkeypatch):
    source, _, adapter = pair
    generator = DecoderSource.of(source, adapter, model=load_model(source), tokenizer=load_tokenizer(source))
    items = [Completion("Water boils at", " 100 and Anna said no dog"), Completion("Anna said " * 40, " no dog" * 60)]
    whole = [read(generator.tokenizer, dataclasses.replace(item, ended=False)) for item in items]
    wanted = generator.compare([whole[0].ids], [whole[0].answer], 3)
    seen, real = [], DecoderSource.compare
    monkeypatch.setattr(DecoderSource, "compare", lambda *given: seen.extend(given[1]) or real(*given))
    figures = templates_module.compare(generator, items, 3)
    assert [len(ids) for ids in seen] == [one.answer + 3 for one in whole]
    for found, other in zip(figures, wanted, strict=True):
        assert found[0] == pytest.approx(other[0], rel=1e-4)


def test_texts_are_continued_each_by_itself(pair):
    source, _, adapter = pair
    tokenizer = load_tokenizer(source)
    generator = DecoderSource.of(source, adapter, model=load_model(source), tokenizer=tokenizer)
    texts = ["Water boils at", "Anna", "The dog of Peter and Anna, said"]
    together = generator.continue_texts(texts, 5, 0.0, jax.random.key(0))
    alone = [generator.continue_texts([text], 5, 0.0, jax.random.key(1))[0] for text in texts]
    assert together == alone
    assert any(together)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" is it? Yes", " is it?"),
        (" is 3.5 m. Or 4.", " is 3.5 m."),
        (" it is \nNo.", ""),
        ("", ""),
        ("?", "?"),
        ("\u662f\u4ec0\u4e48\uff1f\u662f", "\u662f\u4ec0\u4e48\uff1f"),
        (" to stop.", " to stop."),
    ],
)
def test_first_sentence(text, wanted):
    assert first_sentence(text) == wanted


@pytest.mark.parametrize(
    "method",
    ["auto", pytest.param("distill", marks=pytest.mark.slow)],
)
def test_fitted_methods_from_file_to_file(pair, tmp_path, method):
    source, target, adapter = pair
    jcl.save_adapter(adapter, tmp_path / "adapter", base_name="org/src")
    (tmp_path / "prompts.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    given = [str(tmp_path / "adapter"), "--source", str(source.path), "--target", str(target.path)]
    flags = ["--prompts", str(tmp_path / "prompts.txt"), "--out-rank", "5", "--depth", "0,0"]
    flags += ["--completions", "40", "--answer-tokens", "6"]
    main(["transfer", *given, "--out", str(tmp_path / "out"), "--method", method, *flags])
    moved = jcl.load_adapter(tmp_path / "out")
    assert {factors.rank for factors in moved.modules.values()} == {5}
    report = json.loads((tmp_path / "out" / "transfer_report.json").read_text())
    fit = report["fit"]
    assert (fit["planned"], fit["done"], fit["answer_tokens"]) == (40, 1.0, 6)
    assert fit["given"] == fit["answered"] == len(set(CORPUS))
    assert 0 <= fit["agreed"] <= fit["held_out"]
    assert fit["divergence"] < fit["divergence_before"]
    assert report["unmapped_sources"] == []
    assert report["recipe"]["method"] == "distill"
    assert (report["choice"] is None) == (method != "auto")
    assert report["effect"]["outcome"] in ("ineffective", "destructive", "plausible")
    assert "## Fit" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    # The recipe names the files, not where they are.
    places = {"adapter": tmp_path / "adapter", "source": source.path, "target": target.path, "out": tmp_path / "again"}
    places["prompts"] = tmp_path / "prompts.txt"
    recipe = _recipe(tmp_path / "out" / "README.md")
    again = transfer_settings(**recipe | {name: str(place) for name, place in places.items()})
    repeated = transfer_files(again)
    for name, factors in moved.modules.items():
        np.testing.assert_array_equal(factors.a, repeated.adapter.modules[name].a)
    # Where the source wrote its own prompts, the user is told of better ones, and sees some; not so of his own.
    assert "give prompts of" not in jcl.verdict(repeated.report).text
    assert report["examples"] == []
    # The user's own prompts are not written beside the adapter.
    assert not (tmp_path / "out" / "completions.jsonl").exists()
    facts = msgspec.structs.replace(repeated.report.fit, given=0, answered=0, templates=("Q:",))
    shown = {"wrote_prompts": True, "examples": ("Q: a `b`?\nA: c",), "fit": facts}
    written = msgspec.structs.replace(repeated.report, **shown)
    written = complete(written, METHODS[written.recipe.method]())
    assert "give prompts of the adapter's task with --prompts" in jcl.verdict(written).text
    assert "\n- `Q: a b? A: c`\n" in model_card(published(written))
    console = Console(file=io.StringIO(), width=200)
    print_report(written, console)
    assert "written: Q: a `b`? A: c\n" in console.file.getvalue()


def test_examples_are_spread_and_short():
    assert pick_evenly([str(number) for number in range(101)], 3) == ("0", "50", "100")
    assert pick_evenly(["a", "b"], 10) == ("a", "b")
    assert pick_evenly([], 10) == ()
    assert shorten("x" * 400) == "x" * 300 + " ..."


@pytest.mark.full
def test_a_copy_on_its_own_base_stays_as_it_is(pair):
    source, _, adapter = pair
    wanted = dataclasses.replace(SMALL, teacher_weight=1.0, sure_weight=1.0, contrast_weight=0.0, text_weight=0.0)
    found = distill(source, source, adapter, adapter, prompts=CORPUS, settings=wanted)
    assert min(point.divergence for point in found.curve) < 1e-6
    assert found.adapter.modules.keys() == adapter.modules.keys()
    for name, factors in adapter.modules.items():
        change = delta(found.adapter.modules[name]) - delta(factors)
        assert np.linalg.norm(change) < 1e-2 * np.linalg.norm(delta(factors)), name


@pytest.mark.slow
def test_a_copy_to_a_further_trained_base_is_fitted(pair, tmp_path):
    source, _, adapter = pair
    jcl.save_adapter(adapter, tmp_path / "adapter", base_name="org/src")
    shutil.copytree(source.path, tmp_path / "trained")
    rng, file = np.random.default_rng(5), tmp_path / "trained" / "model.safetensors"
    tensors = {
        name: x + 0.3 * x.std() * rng.normal(size=x.shape).astype(x.dtype) if "proj" in name else x
        for name, x in safetensors.numpy.load_file(file).items()
    }
    safetensors.numpy.save_file(tensors, file)
    (tmp_path / "prompts.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    where = {"source": str(source.path), "target": str(tmp_path / "trained"), "out": str(tmp_path / "out")}
    texts = {"prompts": str(tmp_path / "prompts.txt"), "completions": 40}
    given = transfer_settings(str(tmp_path / "adapter"), **where, **texts, method="distilled-copy")
    report = transfer_files(given).report
    assert report.fit.on_top
    assert 0 < report.fit.divergence < report.fit.divergence_before


@pytest.mark.parametrize("setting", [{"calibrate": "frobenius"}, {"scale": 0.6}])
def test_a_fitted_update_is_not_calibrated(pair, tmp_path, setting):
    source, target, adapter = pair
    jcl.save_adapter(adapter, tmp_path / "adapter", base_name="org/src")
    where = {"source": str(source.path), "target": str(target.path), "out": str(tmp_path / "out")}
    given = transfer_settings(str(tmp_path / "adapter"), **where, method="distill", **setting)
    with pytest.raises(UsageError, match=r"(frobenius|scale 0\.6) has no part in method distill"):
        transfer_files(given)
    assert not (tmp_path / "out").exists()


def _recipe(card):
    import tomllib

    return tomllib.loads(card.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0])


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_prompts_are_on_both_sides_of_what_is_held_out(pair, share):
    tokenizers = load_tokenizer(pair[0]), load_tokenizer(pair[1])
    items = [Completion(text, " and water") for text in CORPUS[:2]]
    parts = distillation.hold_out(items, DistillSettings(held_out=share), 0, prompted=True)
    batches, held_out = (make_batches(part, tokenizers, 1.0) for part in parts)
    assert len(batches) == len(held_out) == 1


def test_few_of_the_given_prompts_are_held_out():
    items = [Completion(f"{text} {place}", " yes") for place, text in enumerate(CORPUS * 50)][:200]
    usual, asked = DistillSettings(), DistillSettings(held_out=0.25)
    found = [
        len(distillation.hold_out(items, *how, prompted=given)[1])
        for how, given in (((usual, 0), True), ((usual, 0), False), ((asked, 0), True))
    ]
    assert found == [20, 30, 50]
    assert len(distillation.hold_out(items[:20], usual, 0, prompted=True)[1]) == 3


def test_an_answer_of_the_source_is_always_fitted_to():
    """Also where few prompts are given with many labelled examples, which the hold-out could all take."""
    items = [Completion(f"{text}\n?", " yes") for text in CORPUS[:2]]
    taught = [Completion(f"{place}\n?", " no", taught="answer") for place in range(6)]
    for seed in range(40):
        fitted, judging = distillation.hold_out(items + taught, DistillSettings(held_out=0.5), seed, prompted=True)
        assert any(item in items for item in fitted)
        assert len({item.prompt for item in judging}) == 4
        assert len(fitted) + len(judging) == 8


def test_a_further_round_without_a_prompt_to_ask_for_repeats_those_of_examples(pair):
    source, _, adapter = pair
    generator, prompts = DecoderSource.of(source, adapter), [f"{text}\n?" for text in CORPUS[:2]]
    labelled = [f"{place}\nAnna?" for place in range(20)]
    found = answer_given(generator, generator.alone(), prompts, Sampler(20, 4), labelled=labelled)
    asked = {item.prompt for item in found.more(1, [*prompts, labelled[0]], generator)}
    assert asked <= {*labelled[1:]}
    assert asked
    assert found.more(1, [*prompts, *labelled], generator) == []


@pytest.mark.parametrize("prompted", [True, False])
def test_what_the_target_is_likeliest_to_write_does_not_become_likelier(pair, prompted):
    class Fluent(DecoderSource):
        def write(self, prompts, *_, **__):
            return [Written(" is the first of all things? And more\nthan that", 9, True)] * len(prompts)

    source, student = Fluent.of(pair[0], pair[2]), Fluent.of(pair[1])
    sampler = Sampler(32, 6, temperature=0.0)
    if prompted:
        found = answer_given(source, source.alone(), CORPUS, sampler)
    else:
        found = write_completions(source, source.alone(), sampler, 0)
    assert {item.greedy for item in found.more(1, [], student)} == {False}
    if not prompted:
        assert {item.greedy for item in found.more(1, [], source)} == {True}


def test_repeated_prompts_count_once(pair):
    many, few = (distill(*pair, prompts=lines, settings=SMALL) for lines in (CORPUS * 20, CORPUS))
    assert many.facts == few.facts
    assert many.completions == few.completions


@pytest.mark.full
def test_agreement_is_with_greedy_answers_alone(pair, monkeypatch):
    """With few prompts others are sampled, and labelled answers are the user's: neither is what the source prefers."""
    said, real = [], distillation.batch_answers
    monkeypatch.setattr(
        distillation, "batch_answers", lambda answers, both: said.extend(answers) or real(answers, both)
    )
    prompts = [f"{text}\n?" for text in CORPUS[:5]]
    examples = [Completion(f"{place}\nAnna?", " Peter") for place in range(40)]
    found = distill(*pair, prompts=prompts, examples=examples, settings=dataclasses.replace(SMALL, passes=1))
    assert len({item.prompt for item in said}) == len(said) > 1
    assert {(item.greedy, item.taught) for item in said} == {(True, "nothing")}
    assert found.facts.examples == 40


@pytest.mark.parametrize("text", ["", "5", "0s", "-3min", "4 minutes", "1h30"])
def test_a_budget_that_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match=r"budget .* was asked for, expected a time such as 90s"):
        DistillSettings(budget=text).check()


def test_a_budget_is_a_time():
    found = [DistillSettings(budget=text).seconds for text in (None, "90s", "20min", "1.5 h")]
    assert found == [None, 90, 1200, 5400]


@pytest.fixture(scope="module")
def teaching(pair):
    """Makes the teacher of settings; and batches."""
    source, target, adapter = pair
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    batches = make_batches([Completion(text, " and water") for text in CORPUS], tokenizers, 1.0)
    columns = find_columns(source, target, batches, 400)
    src, tgt = (RestrictedModel.of(load_model(base), columns.head_rows(side)) for side, base in enumerate(pair[:2]))
    reader = DecoderReader(src.with_adapter(stack_adapter(adapter, source)))

    def teacher(settings, known=1.0):
        return Teacher(reader, tgt, columns, settings.teacher_weights(known))

    return teacher, batches


def test_the_teacher_follows_the_source_where_it_is_sure():
    own, base = (
        jax.nn.log_softmax(jnp.asarray([values] * 2)) for values in ([0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 1.0])
    )
    adapted = jnp.log(jnp.asarray([[1 - 3e-9, 1e-9, 1e-9, 1e-9], [0.25, 0.25, 0.25, 0.25]]))
    sure, unsure = np.exp(mix_teacher(own, base, adapted, 0.5, 1.0, 0.0))
    np.testing.assert_allclose(sure, np.exp(adapted[0]), atol=1e-6)
    share = 0.5 + 0.5 / 4  # exp(-log 4) of four tokens that are equally likely
    mixed = np.asarray((1 - share) * own + share * adapted)[1]
    np.testing.assert_allclose(unsure, np.exp(mixed) / np.exp(mixed).sum(), rtol=1e-5)


def test_a_sure_source_counts_more_the_better_its_task_is_known(teaching):
    def predicted(sure, known=1.0):
        settings = dataclasses.replace(SMALL, teacher_weight=0.5, sure_weight=sure)
        return np.asarray(teaching[0](settings, known).read(teaching[1][0]).teacher)

    np.testing.assert_array_equal(predicted(None), predicted(1.0))
    np.testing.assert_array_equal(predicted(None, 0.0), predicted(0.5))
    np.testing.assert_array_equal(predicted(None, 0.5), predicted(0.75))
    np.testing.assert_array_equal(predicted(0.25, 0.5), predicted(0.25))
    assert np.abs(predicted(0.5) - predicted(1.0)).max() > 0.1


def test_a_teacher_of_the_source_alone_does_not_read_the_target(teaching, monkeypatch):
    settings = dataclasses.replace(SMALL, teacher_weight=1.0, sure_weight=1.0, contrast_weight=0.0)
    alone = np.asarray(teaching[0](settings).read(teaching[1][0]).teacher)
    mixed = dataclasses.replace(settings, teacher_weight=0.5)
    assert np.abs(alone - np.asarray(teaching[0](mixed).read(teaching[1][0]).teacher)).max() > 0.1

    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(teacher_module, "shared_log_probs", refuse)
    np.testing.assert_array_equal(np.asarray(teaching[0](settings).read(teaching[1][0]).teacher), alone)


@pytest.fixture(scope="module")
def beginning(teaching):
    """A teacher, what is held out, and other completions."""
    teacher, batches = teaching[0](SMALL), teaching[1]
    return teacher, batches[1:], [teacher.read(batches[0])]


LONG = dataclasses.replace(SMALL, completions=USUAL + 3 * ROUND, rate=1e-2)


def test_an_interrupted_fit_keeps_the_best_update(beginning):
    teacher, batches, held_out = beginning
    seen = []

    def fresh(number, own):
        seen.append(own)
        if number == 8:
            raise KeyboardInterrupt
        return batches

    asked = dataclasses.replace(LONG, completions=USUAL + 9 * ROUND, polish=0.25)
    found = Fit(teacher, Judge(held_out), asked, begun=time.monotonic()).run(batches, fresh)
    assert 0 < found.done < 1
    assert found.curve[-1].completions > 0
    best = min(point.divergence for point in found.curve)
    assert best < found.curve[0].divergence
    assert mean_kl(teacher.target.with_adapter(found.adapter), held_out) == pytest.approx(best)
    # The last quarter of all completions is answered by the target with its update.
    assert [own is None for own in seen] == [True] * 6 + [False] * 2
    assert found.own == sum(batch.rows for batch in batches)
    assert found.new_completions == 7 * found.own


def test_a_stopped_fit_continues_to_the_same_update(beginning, tmp_path):
    teacher, batches, held_out = beginning

    def run(fresh, states):
        return Fit(teacher, Judge(held_out), LONG, begun=time.monotonic()).run(batches, fresh, states)

    def fresh(number, _):
        if number == 2 and not seen:
            seen.append(number)
            raise RuntimeError
        return batches

    seen = []
    with closing(Checkpoints(tmp_path / "states", {"seed": 0})) as states, pytest.raises(RuntimeError):
        run(fresh, states)
    with closing(Checkpoints(tmp_path / "states", {"seed": 0})) as states:
        found = run(fresh, states)
    seen.append("again")
    whole = run(fresh, None)
    assert [point.divergence for point in found.curve] == [point.divergence for point in whole.curve]
    assert [point.completions for point in found.curve] == [point.completions for point in whole.curve]
    jax.tree.map(np.testing.assert_array_equal, found.adapter, whole.adapter)


@pytest.mark.full
def test_a_stopped_distillation_leaves_a_state_that_only_the_same_one_continues(pair, tmp_path, monkeypatch):
    source, target, adapter = pair
    for module in (settings_module, completions_module):
        monkeypatch.setattr(module, "ROUND", 8)
    monkeypatch.setattr(settings_module, "MOST_GIVEN", 40)
    asked = dataclasses.replace(SMALL, completions=48, passes=1, answer_tokens=2)
    calls = []

    def stop(*_):
        raise RuntimeError

    def whole(seed=0):
        return distill(source, target, adapter, prompts=CORPUS, settings=asked, seed=seed, states=tmp_path / "fits")

    with monkeypatch.context() as patch:
        patch.setattr(
            distillation, "answer_given", lambda *a, **k: dataclasses.replace(answer_given(*a, **k), more=stop)
        )
        with pytest.raises(RuntimeError):
            whole()
    (kept,) = (tmp_path / "fits").iterdir()
    step = fit_module.gradient_step
    monkeypatch.setattr(fit_module, "gradient_step", lambda *a, **k: calls.append(1) or step(*a, **k))
    whole(seed=1)
    other = len(calls)
    assert kept.exists()
    target = dataclasses.replace(target, chat_template="{{ messages[0]['content'] }}")
    whole()
    assert len(calls) == 2 * other
    assert kept.exists()
    target, other = pair[1], len(calls)
    whole()
    assert 0 < len(calls) - other < other / 4
    assert not kept.exists()


@pytest.fixture
def growing(pair, monkeypatch):
    """Return a short distillation with further rounds, whose states are kept in a folder."""
    for module in (settings_module, completions_module):
        monkeypatch.setattr(module, "ROUND", 8)
    monkeypatch.setattr(settings_module, "MOST_GIVEN", 40)
    asked = dataclasses.replace(SMALL, completions=48, passes=1, answer_tokens=2)
    return lambda states: distill(*pair, prompts=CORPUS, settings=asked, states=states)


@pytest.mark.parametrize("cache", full_except(["full", "a file"], ["a file"]))
def test_a_fit_goes_on_where_its_states_cannot_be_kept(growing, tmp_path, caplog, monkeypatch, cache):
    if cache == "a file":
        (tmp_path / "fits").write_text("mine")
    else:
        fill_disk(monkeypatch, after=1)
    found = growing(tmp_path / "fits")
    (warned,) = (record.getMessage() for record in caplog.records if record.levelname != "INFO")
    assert re.search(r"the states of the fit cannot be kept \((No space left|Not a dir|File exists)", warned)
    assert "\n" not in warned
    caplog.clear()
    whole = growing(None)
    assert not caplog.records
    jax.tree.map(np.testing.assert_array_equal, found.adapter, whole.adapter)
    assert (tmp_path / "fits").is_dir() == (cache == "full")
    assert cache == "a file" or not list((tmp_path / "fits").iterdir())


@pytest.mark.full
def test_a_fit_with_a_damaged_state_begins_again(growing, tmp_path, caplog, monkeypatch):
    def stop(*_):
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(fit_module.Fit, "_evaluate", stop)
        with pytest.raises(RuntimeError):
            growing(tmp_path / "fits")
    (folder,) = (tmp_path / "fits").iterdir()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.write_bytes(path.read_bytes()[:20])
    found = growing(tmp_path / "fits")
    (warned,) = (record.getMessage() for record in caplog.records if record.levelname != "INFO")
    assert "the fit begins again" in warned
    jax.tree.map(np.testing.assert_array_equal, found.adapter, growing(None).adapter)


def test_the_last_steps_are_judged_if_the_time_ends_while_a_state_is_saved(beginning, monkeypatch):
    teacher, batches, held_out = beginning
    now, step = [0.0], fit_module.gradient_step

    class Slow:
        def restore(self, state):
            return state, {}

        def save(self, *_):
            now[0] += 50

    def stepped(*given, **how):
        now[0] += 80 / (LONG.course(prompted=True).passes * len(batches))
        return step(*given, **how)

    monkeypatch.setattr(fit_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(fit_module, "gradient_step", stepped)
    timed = dataclasses.replace(LONG, budget="90s")
    fit = Fit(teacher, Judge(held_out), timed, prompted=True, begun=0.0)
    found = fit.run(batches, lambda *_: pytest.fail("the time is over"), Slow())
    assert found.curve[-1].completions == sum(batch.rows for batch in batches)
    assert mean_kl(teacher.target.with_adapter(found.adapter), held_out) < found.curve[0].divergence


def test_a_fit_ends_when_its_time_is_used_up(beginning, monkeypatch):
    teacher, batches, held_out = beginning
    now, seen, shares = [10.0], [], []

    def fresh(number, _):
        seen.append(number)
        now[0] += 40
        return batches

    monkeypatch.setattr(fit_module, "schedule", lambda share: shares.append(share) or schedule(share))
    monkeypatch.setattr(fit_module.time, "monotonic", lambda: now[0])
    found = Fit(teacher, Judge(held_out), dataclasses.replace(LONG, budget="90s"), begun=0.0).run(batches, fresh)
    assert seen == [1, 2]
    # The second of these rounds is written when the time is over.
    assert found.curve[-1].completions == 2 * sum(batch.rows for batch in batches)
    assert found.done == 1
    # The rate begins with the first step, however long the first completions took.
    first = shares[: LONG.course(prompted=False).passes * len(batches)]
    assert (first[0], max(first)) == (0, pytest.approx(10 / 90))
    assert shares == sorted(shares)


def test_the_first_completions_are_used_where_they_took_all_of_the_time(beginning):
    teacher, batches, held_out = beginning

    def fresh(*_):
        raise AssertionError

    def run(begun, **changed):
        return Fit(teacher, Judge(held_out), dataclasses.replace(LONG, **changed), begun=begun).run(batches, fresh)

    found, whole = run(time.monotonic() - 2, budget="1s"), run(time.monotonic(), completions=USUAL)
    assert found.curve[-1].divergence < found.curve[0].divergence
    assert [point.divergence for point in found.curve] == [point.divergence for point in whole.curve]
    jax.tree.map(np.testing.assert_array_equal, found.adapter, whole.adapter)


def test_completions_beyond_the_first_are_written_in_rounds():
    found = [DistillSettings(completions=count).course(prompted=False).rounds for count in (16, 300, 301, 396)]
    assert found == [(16,), (300,), (300, 48), (300, 48, 48)]


def test_given_prompts_are_all_answered_before_the_fit_and_the_more_they_are_the_fewer_passes_there_are():
    courses = [DistillSettings().for_prompts(count).course(prompted=True) for count in (200, 300, 600, 1000, 5000)]
    assert [course.rounds for course in courses] == [(200,), (300,), (600,), (1000,), (1000,)]
    assert [course.passes for course in courses] == [8, 8, 4, 2, 2]
    # A budget begins early, and takes the other prompts in its rounds.
    assert DistillSettings(budget="5min").for_prompts(1000).course(prompted=True).rounds == (300,)
    assert DistillSettings(completions=1060).course(prompted=True).rounds == (1000, 48, 48)


def test_the_rate_rises_and_falls_to_zero():
    rates = [schedule(share) for share in np.linspace(0, 1, 101)]
    assert 0 < rates[0] < 0.1
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert rates[-1] == pytest.approx(0, abs=1e-6)
    assert np.argmax(rates) <= 6
    assert (np.diff(rates[6:]) <= 0).all()
