"""Fits of several adapters of one pair: what they share, and that each is what it is alone."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_bases import CORPUS, write_base
from safetensors.numpy import load_file
from tiny_bases import random_adapter
from transfers import move_files

import jcrosslora as jcl
from jcrosslora import read_plan, run_batch
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import Generator, fast_dtype, load_model, loaded_within, loading, stack_adapter
from jcrosslora.distill import fit as fit_module
from jcrosslora.distill.batches import make_batches
from jcrosslora.distill.output_columns import EosTokens, find_columns
from jcrosslora.distill.sources.decoder import NO_TOKEN, DecoderReader, RestrictedModel
from jcrosslora.distill.teacher import Teacher
from jcrosslora.text import Completion

FIT = {"completions": 20, "fit_rank": 2, "passes": 1, "answer_tokens": 4, "compared_tokens": 300}
PLAN = """
out = "moved"
[bases]
small = "small"
wide = "wide"
[adapters]
small = ["adapters/*"]
[[moves]]
from = "small"
to = "wide"
methods = "distill"
prompts = "texts.txt"
""" + "\n".join(f"{name} = {value}" for name, value in FIT.items())


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Two bases, three adapters of the first of which one cannot be run, and a plan."""
    folder = tmp_path_factory.mktemp("house")
    write_base(folder / "small", 30, bos=True, layers=2)
    write_base(folder / "wide", 90, layers=2, hidden=32, head_dim=8, seed=1)
    base = jcl.open_base(folder / "small")
    for number, scale in enumerate((0.3, 1e30, 0.2)):
        one = random_adapter(base, seed=number, scale=scale)
        jcl.save_adapter(one, folder / "adapters" / f"a{number}", base_name="x")
    (folder / "texts.txt").write_text("\n".join(CORPUS))
    (folder / "plan.toml").write_text(PLAN)
    return folder


@pytest.mark.full
def test_a_batch_shares_bases_and_programs_and_fits_each_adapter_as_alone(house, monkeypatch, caplog):
    loads, shapes, step = [], set(), fit_module.gradient_step

    def load(base, dtype=jnp.float32, **more):
        loads.append((Path(base.name).name, jnp.dtype(dtype)))
        return load_model(base, dtype, **more)

    def counted(target, state, batch, rate, **more):
        shapes.add((batch.tokens.shape, batch.at.shape))
        return step(target, state, batch, rate, **more)

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(fit_module, "gradient_step", counted)
    with jax.log_compiles(), caplog.at_level(logging.WARNING), jcl.show_progress():
        outcomes = run_batch(read_plan(house / "plan.toml")).outcomes
    assert [one.status for one in outcomes.values()] == ["done", "failed", "done"]
    assert "not finite" in list(outcomes.values())[1].text
    assert caplog.text.count("Compiling jit(gradient_step)") == len(shapes)
    kinds = {fast_dtype(), np.dtype(np.float32)}
    assert sorted(loads, key=str) == sorted(((name, kind) for name in ("small", "wide") for kind in kinds), key=str)
    places = house / "adapters" / "a2", house / "small", house / "wide", house / "alone"
    move_files(*places, method="distill", prompts=str(house / "texts.txt"), **FIT)
    (out,) = (house / one.out for one in outcomes.values() if "a2" in one.name)
    moved, alone = (folder / "adapter_model.safetensors" for folder in (out, house / "alone"))
    assert load_file(moved).keys() == load_file(alone).keys()
    for name, tensor in load_file(alone).items():
        np.testing.assert_array_equal(load_file(moved)[name], tensor)


def test_columns_without_a_token_change_no_prediction(house):
    source, target = (jcl.open_base(house / name) for name in ("small", "wide"))
    adapter = jcl.load_adapter(house / "adapters" / "a0", source)
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    batches = make_batches([Completion(text, " and water") for text in CORPUS[:4]], tokenizers, 1.0)
    ends = (tokenizers[0].stops, tokenizers[1].stops) if all(one.stops for one in tokenizers) else ((), ())
    found = {}
    for rounded in (False, True):
        columns = find_columns(source, target, batches, 40, EosTokens(ends, ends), rounded=rounded)
        src, tgt = (
            RestrictedModel.of(load_model(base), columns.head_rows(side), len(ends[side]))
            for side, base in enumerate((source, target))
        )
        reader = DecoderReader(src.with_adapter(stack_adapter(adapter, source)))
        sides = Teacher(reader, tgt, columns, (0.5, 1.0, 0.25))
        there = np.append(columns.tokens(1) != NO_TOKEN, np.ones(int(bool(ends[1])), bool))
        assert rounded == (not there.all())
        taught, *own = sides.sides(batches[0])
        found[rounded] = [np.asarray(one)[:, there] for one in (taught.teacher, *own)]
        np.testing.assert_array_equal(taught.weight, columns.moves(batches[0])[1])
        for one in (taught.teacher, *own):
            assert np.exp(np.asarray(one)[:, ~there]).sum(-1).max(initial=0) < 1e-8
    for plain, filled in zip(found[False], found[True], strict=True):
        np.testing.assert_allclose(filled, plain, rtol=1e-5, atol=1e-5)
    assert columns.sizes[0] % 512 == 0
    assert len(columns.shared[0]) < 512


def test_answers_of_nearly_the_same_length_are_written_by_one_program(house, caplog):
    writer = Generator.of(jcl.open_base(house / "small"))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = [writer.continue_texts(CORPUS[:3], most, 1.0, jax.random.key(0)) for most in (9, 12, 16)]
    assert caplog.text.count("Compiling jit(extend)") == 1
    assert all(long.startswith(short) for short, long in zip(found[0], found[2], strict=True))
    assert found[0] != found[2]


def test_what_is_kept_of_bases_follows_the_free_memory():
    narrow, wide = fast_dtype(), np.dtype(np.float32)
    fitted, all_of_it = 30 * narrow.itemsize, 30 * wide.itemsize + (0 if narrow == wide else 30 * narrow.itemsize)
    assert loaded_within(None, [10, 20]).kept == frozenset()
    assert loaded_within(2 * all_of_it, [10, 20]).kept == {narrow, wide}
    few = loaded_within(2 * all_of_it - 1, [10, 20])
    assert few.kept == (set() if narrow == wide else {narrow})
    assert loaded_within(2 * (fitted + 20 * wide.itemsize) - 1, [10, 20]).kept == set()
