"""Too little memory: one clear error, and finished work is kept."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import main
from full_set import full_except
from test_effect import move_in
from test_transfer import WIDER
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora import read_plan, run_batch, transfer_files
from jcrosslora.decoder import loading
from jcrosslora.utils import cost
from jcrosslora.utils.cost import enough_memory

TEXTS = ["Anna said that the water boils.", "Peter has a dog."] * 8
TOO_MANY = 2**46  # numbers; no machine has that


def fill_device(*_, **__):
    jnp.zeros(TOO_MANY).block_until_ready()


def fill_host(*_, **__):
    np.zeros(TOO_MANY)


def bare(*_, **__):
    raise MemoryError


@pytest.mark.parametrize(
    ("fill", "said"),
    [(fill_device, r"not enough memory \(.*\d{12} bytes\): use"), (fill_host, r"\(Unable to .*\)"), (bare, "memory: ")],
)
def test_memory_errors_become_short_memory_errors(fill, said):
    with pytest.raises(jcl.ShortMemoryError, match=said) as caught, enough_memory():
        fill()
    assert str(caught.value).endswith("use a device or a machine with more memory")
    with pytest.raises(jcl.ShortMemoryError, match=f"{said}.* with more memory, or wait"), enough_memory("wait"):
        fill()


@pytest.mark.parametrize(
    "error", [RuntimeError("RESOURCE_EXHAUSTED: not of JAX"), jax.errors.JaxRuntimeError("INTERNAL: x"), OSError("x")]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, enough_memory():
        raise error
    assert caught.value is error


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    write_llama(folder / "small", seed=0)
    write_llama(folder / "wide", seed=1, first_token=20, **WIDER)
    base = jcl.open_base(folder / "small")
    for number in range(2):
        adapter = random_adapter(base, seed=number, rank=2 + number)
        jcl.save_adapter(adapter, folder / "adapters" / f"a{number}", base_name="org/small")
    return folder


@pytest.mark.parametrize("method", full_except(["Hooked", "HookedOnText"], ["Hooked"]))
def test_transfer_reports_short_memory_in_one_line_and_writes_nothing(tmp_path, hooks, capsys, method):
    hooks.append(fill_device)
    given = move_in(tmp_path, "copy", TEXTS)
    places = ["--source", given.source, "--target", given.target, "--out", given.out, "--prompts", given.prompts]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as left:
        main(["transfer", given.adapter, *places, "--method", f"user_methods:{method}"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jcrosslora: not enough memory (")
    # One that looks at weights alone needs the least there is.
    assert ("such as cross-lora" in line) == (method == "HookedOnText")
    assert sorted(tmp_path.iterdir()) == before


def test_free_memory_is_that_of_the_host_or_of_its_container(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_GROUP", tmp_path / "none")
    host = cost.free_memory()
    assert host is not None
    assert host > 1e6
    monkeypatch.setattr(cost, "_GROUP", tmp_path)
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert cost.free_memory() == 600
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 250\n")  # files that were read
    assert cost.free_memory() == 850
    (tmp_path / "memory.max").write_text("max\n")
    assert cost.free_memory() > 1000


@pytest.mark.parametrize(("limits", "free"), [((900, 700), 400), ((900, None), None)])
def test_free_memory_of_several_devices_is_the_least_of_any(monkeypatch, limits, free):
    stats = [None if limit is None else {"bytes_limit": limit, "bytes_in_use": 300} for limit in limits]
    devices = [SimpleNamespace(platform="gpu", memory_stats=lambda one=one: one) for one in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert cost.free_memory() == 600
    assert cost.free_memory(2) == free


def test_every_command_reports_short_memory(house, monkeypatch, capsys):
    monkeypatch.setattr("jcrosslora.report.inspect.open_base", fill_host)
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(house / "small")])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("jcrosslora: not enough memory (Unable to allocate")


def test_a_transfer_survives_short_memory_in_the_effect_check(tmp_path, monkeypatch):
    given = move_in(tmp_path, "theseus", TEXTS)
    monkeypatch.setattr(loading, "load_model", fill_device)
    report = transfer_files(given).report
    assert report.effect is None
    assert report.warnings[-1].startswith("the effect was not measured: not enough memory (")
    assert report.warnings[-1].endswith("or leave out the check with --effect never")
    assert jcl.load_adapter(tmp_path / "out").modules
    with pytest.raises(jcl.ShortMemoryError):
        transfer_files(dataclasses.replace(given, effect="always", out=str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()


def test_a_batch_job_that_runs_out_of_memory_fails_alone(house, tmp_path, hooks):
    head = f'out="moved"\n[bases]\nsmall="{house}/small"\nwide="{house}/wide"\n'
    adapters = f'[adapters]\nsmall=["{house}/adapters/*"]\n'
    move = '[[moves]]\nfrom="small"\nto="wide"\nmethods=["user_methods:Hooked"]\n'
    text = head + adapters + move
    (tmp_path / "plan.toml").write_text(text)

    def fill_for_rank_2(context):
        if next(iter(context.adapter.modules.values())).rank == 2:
            fill_device()

    hooks.append(fill_for_rank_2)
    first, second = run_batch(read_plan(tmp_path / "plan.toml")).outcomes.values()
    assert (first.status, second.status) == ("failed", "done")
    assert first.text.startswith("not enough memory (")
    hooks.clear()
    assert [one.status for one in run_batch(read_plan(tmp_path / "plan.toml")).outcomes.values()] == ["done", "kept"]
