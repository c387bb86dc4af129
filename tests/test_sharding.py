"""Bases divided over devices: which side of each matrix, when, and that all numbers stay what they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import main
from full_set import full_except
from probe_bases import CORPUS, write_move
from sharded_session import CASES, base_of
from user_methods import methods_of_the_page

import jcrosslora as jcl
from jcrosslora.decoder import Sampling, extend, fast_dtype, forward, load_model, prefill, stack_adapter
from jcrosslora.decoder.loading import divided_axis, held_numbers, streamed_numbers
from jcrosslora.distill.batches import peak_bytes
from jcrosslora.errors import UsageError
from jcrosslora.methods import Distill
from jcrosslora.session import estimate
from jcrosslora.session.estimate import choose_placement
from jcrosslora.session.settings import TransferOptions
from jcrosslora.utils import cost

GB = 10**9
PATIENCE = 1200  # seconds; the session takes one, but more on a busy machine


@pytest.fixture(scope="module")
def session():
    """Run a process with four devices; return what it prints of each part."""
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4",
    }
    script = Path(__file__).with_name("sharded_session.py")
    parts = [*CASES, "transfer"]
    done = subprocess.run(
        [sys.executable, str(script), *parts], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {name: value for line in done.stdout.splitlines() for name, value in json.loads(line).items()}
    return found | {"said": done.stderr}


def test_modules_that_write_to_the_stream_are_divided_by_columns_and_others_by_rows():
    shape = (3, 8, 12)
    assert [divided_axis(role, shape, 4) for role in ("q_proj", "up_proj", "in_proj_qkv")] == [1, 1, 1]
    assert [divided_axis(role, shape, 4) for role in ("o_proj", "down_proj", "mamba_out_proj")] == [2, 2, 2]
    assert [divided_axis(name, (3, 5, 8, 12), 4) for name in ("gate_up", "down")] == [2, 3]
    assert [divided_axis(name, (96, 32), 4) for name in ("embedding", "head", "layer_embedding")] == [0, 0, 0]
    assert [divided_axis(name, shape, 4) for name in ("router", "conv", "attn")] == [None] * 3


def test_the_other_side_is_divided_where_the_first_cannot_be_and_else_none():
    assert divided_axis("embedding", (90, 32), 4) == 1
    assert divided_axis("down_proj", (2, 32, 66), 4) == 1
    assert divided_axis("q_proj", (2, 6, 9), 4) is None
    assert divided_axis("q_proj", (2, 8, 8), 1) is None


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_those_of_the_weights(name):
    base = base_of(CASES[name][0])
    assert held_numbers(base) == sum(base.tensor(tensor).size for tensor in base.store.names())


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_each_device_holds_its_part_alone(session, name):
    found = session[name]
    held, counted, whole = found["held"]
    assert held == counted < 0.5 * whole
    # Rows of 90 and 66 are no multiples of 4, so that these matrices are divided along their other side.
    uneven = {"embedding": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 1}
    for role, axis in found["shares"].items():
        if name == "llama":
            assert axis == uneven.get(role, 2 if role == "o_proj" else 1)
        assert axis is not None


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_logits_written_text_and_steps_of_a_fit_are_those_of_one_device(session, name):
    found = session[name]
    assert found["logits"] < 1e-5
    assert found["same text"]
    assert found["different tokens"] > 3
    # Adam makes small gradients large; a sum over devices of bfloat16 numbers may be rounded otherwise.
    assert found["factors"] < (1e-3 if CASES[name][1] == "float32" else 2e-2)
    # From a state on one device, and from that which the first step leaves on four.
    assert found["compiled"] == 2


@pytest.mark.full
def test_a_transfer_with_divided_weights_gives_the_same_update(session):
    found = session["transfer"]
    assert found["texts"]
    # Where numbers are rounded to bfloat16, the last digit of one that is summed over devices may round it otherwise.
    assert found["updates"] < (1e-3 if fast_dtype() == "float32" else 5e-2)
    assert found["effect"] < 1e-4
    assert found["devices"] == [1, 4]
    assert "jcrosslora: devices: 4 share the weights: " in session["said"]


def sizes(count):
    """Bytes on each of so many devices: 3 divide less than 2."""
    return {1: 40, 2: 21, 3: 30, 4: 12}[count] * GB


def test_weights_are_divided_where_they_do_not_fit_into_one_device():
    fits = choose_placement(sizes, 6 * GB, 4, 46 * GB, "auto")
    assert (fits.devices, fits.weights, fits.mesh) == (1, 40 * GB, None)
    assert choose_placement(sizes, 6 * GB, 4, None, "auto").devices == 1
    divided = choose_placement(sizes, 6 * GB, 4, 46 * GB - 1, "auto")
    assert (divided.devices, divided.weights) == (4, 12 * GB)
    assert divided.text() == (
        "4 share the weights: 12.00 GB of 40.00 GB on each, and up to 6.00 GB on top, where 46.00 GB are free"
    )


def test_division_can_be_asked_for_and_forbidden():
    assert choose_placement(sizes, 0, 4, 10 * GB, "never").devices == 1
    assert choose_placement(sizes, 0, 4, 100 * GB, "always").devices == 4
    with pytest.raises(UsageError, match="cannot be divided over 1 device: leave it out"):
        choose_placement(sizes, 0, 1, None, "always")
    with pytest.raises(UsageError, match="divide is 'some'; expected 'auto', 'always', 'never', 'stream'"):
        TransferOptions(divide="some")  # pyright: ignore[reportArgumentType]


def test_as_many_devices_are_used_as_leave_the_least_on_each():
    assert choose_placement(sizes, 0, 3, 10 * GB, "auto").devices == 2


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_move(tmp_path_factory.mktemp("sharding"))


def command(places, tmp_path, *more):
    adapter, source, target = map(str, places)
    main(["transfer", adapter, "--source", source, "--target", target, "--out", str(tmp_path / "out"), *more])


def needed(places, count):
    """Bytes that the weights of a fit take on each device, in it and in the check of its effect."""
    held = [held_numbers(jcl.open_base(place), count) for place in places[1:]]
    return max(fast_dtype().itemsize * sum(held), 4 * max(held))


def test_a_dry_run_says_where_the_weights_lie(places, tmp_path, monkeypatch, capsys):
    there = jax.local_device_count()
    extra = peak_bytes(jcl.open_base(places[2]), Distill())
    monkeypatch.setattr(estimate, "free_of_each", lambda: needed(places, 1) + extra - 1)
    command(places, tmp_path, "--method", "distill", "--dry-run", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["placement"] == {
        "devices": there,
        "devices_there": there,
        "weights_bytes": needed(places, there),
        "whole_bytes": needed(places, 1),
        "extra_bytes": extra,
        "free_bytes": needed(places, 1) + extra - 1,
        "streamed_bytes": 0,
    }
    command(places, tmp_path, "--method", "distill", "--dry-run", "--divide", "never")
    assert f"\ndevices 1 of {there} has all weights: " in capsys.readouterr().out


def test_the_weights_of_a_fit_of_ones_own_are_counted_and_divided(places, tmp_path, monkeypatch, capsys):
    there = jax.local_device_count()
    held = {count: sum(held_numbers(jcl.open_base(place), count) for place in places[1:]) for count in (1, there)}
    sizes = {count: fast_dtype().itemsize * numbers for count, numbers in held.items()}
    monkeypatch.setattr(estimate, "free_of_each", lambda: sizes[1] - 1)
    with methods_of_the_page(tmp_path):
        command(places, tmp_path, "--method", "my_fit:BestOfTwo", "--effect", "never", "--dry-run", "--json")
        found = json.loads(capsys.readouterr().out)
        monkeypatch.setattr(estimate, "free_of_each", lambda: sizes[there] - 1)
        with pytest.raises(SystemExit):
            command(places, tmp_path, "--method", "my_fit:BestOfTwo", "--effect", "never")
    assert "the weights of the fit take" in capsys.readouterr().err
    placement = found["placement"]
    assert (placement["devices"], placement["weights_bytes"], placement["whole_bytes"]) == (
        *(there, sizes[there]),
        sizes[1],
    )
    assert found["memory_bytes"] == sizes[there] + estimate.PROCESS


@pytest.mark.full
def test_a_fit_of_ones_own_runs_on_the_devices_that_share_its_weights(places, tmp_path):
    with methods_of_the_page(tmp_path) as names:
        method = names["BestOfTwo"](completions=16)
        found = jcl.transfer(*places, method, prompts=CORPUS, divide="always", effect="never", cache=False)
    assert found.report.fit.devices == jax.local_device_count()


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_weights_that_fit_nowhere_are_refused_with_what_they_take_and_what_is_there(
    places, tmp_path, monkeypatch, capsys, more
):
    monkeypatch.setattr(estimate, "free_of_each", lambda: 1000)
    with pytest.raises(SystemExit) as left:
        command(places, tmp_path, "--method", "distill", *more)
    assert left.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    said = r"not enough memory (the weights of the fit take 0.00 GB of each of 2 devices, where 0.00 GB are free): use "
    assert line.startswith(f"jcrosslora: {said}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", full_except(CASES, ["llama"]))
def test_a_base_whose_layers_are_streamed_reads_and_writes_the_same(name):
    base, dtype = base_of(CASES[name][0]), jnp.dtype(CASES[name][1])
    tokens = np.random.default_rng(0).integers(0, base.dims.vocab, (2, 7)).astype(np.int32)

    def run(model):
        begun = prefill(model, tokens, np.ones(tokens.shape, bool), room=4)
        written = extend(model, begun, Sampling(jnp.float32(0), jax.random.key(0)), count=4)[1]
        return jax.jit(lambda model: forward(model, tokens).hidden)(model), written

    whole, streamed = load_model(base, dtype), load_model(base, dtype, streamed=True)
    kinds = {array.sharding.memory_kind for array in streamed.params.weights.values()}
    assert kinds == {"pinned_host"} != {whole.params.embedding.sharding.memory_kind}
    for one, other in zip(run(whole), run(streamed), strict=True):
        assert np.array_equal(one, other)


def streamed_move(folder):
    """An adapter, and two bases; the source is streamed, and has layers enough that this helps."""
    adapter, source, target = write_move(folder, source_layers=6)
    held = [held_numbers(jcl.open_base(place), streamed=place == source) for place in (source, target)]
    return (adapter, source, target), max(fast_dtype().itemsize * sum(held), 4 * max(held))


def test_a_source_that_fits_nowhere_is_streamed(tmp_path, monkeypatch, capsys):
    places, least = streamed_move(tmp_path)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setattr(estimate, "free_of_each", lambda: least)
    command(places, tmp_path, "--method", "distill", "--dry-run", "--json")
    found = json.loads(capsys.readouterr().out)["placement"]
    layers = streamed_numbers(jcl.open_base(places[1]))
    assert found["devices"] == 1
    assert found["weights_bytes"] == least
    assert found["streamed_bytes"] == fast_dtype().itemsize * layers
    command(places, tmp_path, "--method", "distill", "--dry-run")
    assert "; the layers of the source stay in the host's memory: each batch" in capsys.readouterr().out
    monkeypatch.setattr(cost, "_free_of_host", lambda: 10)
    with pytest.raises(SystemExit):
        command(places, tmp_path, "--method", "distill", "--dry-run")
    assert "the layers of the source take 0.00 GB of the host's memory" in capsys.readouterr().err


@pytest.mark.full
def test_a_move_from_a_streamed_source_gives_the_same_adapter(places):
    method = Distill(completions=20, fit_rank=2, passes=1, answer_tokens=4, compared_tokens=300)
    options = {"prompts": CORPUS, "cache": False}
    found = [jcl.transfer(*places, method, divide=divide, **options).adapter for divide in ("never", "stream")]
    one, other = (stack_adapter(adapter, jcl.open_base(places[2])) for adapter in found)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
