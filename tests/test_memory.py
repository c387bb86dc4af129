"""Too little memory: one clear error, and finished work is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_effect import move_in
from test_transfer import WIDER
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora.batch import read_plan, run_batch
from jcrosslora.batch import run as batch_module
from jcrosslora.cli.main import main
from jcrosslora.evaluate import effect_check
from jcrosslora.session import transfer as trip
from jcrosslora.utils.memory import enough_memory

TOO_MANY = 2**46  # numbers, more than fit into any memory


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


@pytest.mark.parametrize("method", ["cross-lora", "theseus"])
def test_transfer_reports_short_memory_in_one_line_and_writes_nothing(house, tmp_path, monkeypatch, capsys, method):
    monkeypatch.setattr(trip, "open_both", fill_device)
    places = ["--source", str(house / "small"), "--target", str(house / "wide"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        main(["transfer", str(house / "adapters" / "a0"), *places, "--method", method])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jcrosslora: not enough memory (")
    # Methods that read weights only need the least memory.
    assert ("such as cross-lora" in line) == (method == "theseus")
    assert not list(tmp_path.iterdir())


def test_every_command_reports_short_memory(house, monkeypatch, capsys):
    monkeypatch.setattr("jcrosslora.report.inspect.open_base", fill_host)
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(house / "small")])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("jcrosslora: not enough memory (Unable to allocate")


def test_a_transfer_survives_short_memory_in_the_effect_check(tmp_path, monkeypatch):
    given = move_in(tmp_path, "residual-fit", ["Anna said that the water boils.", "Peter has a dog."] * 8)
    monkeypatch.setattr(effect_check, "load_params", fill_device)
    report = jcl.transfer(given).report
    assert report.effect is None
    assert report.warnings[-1].startswith("the effect was not measured: not enough memory (")
    assert report.warnings[-1].endswith("or leave out the check with --effect never")
    assert jcl.load_adapter(tmp_path / "out").modules
    with pytest.raises(jcl.ShortMemoryError):
        jcl.transfer(dataclasses.replace(given, effect="always", out=str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()


def test_a_batch_job_that_runs_out_of_memory_fails_alone(house, tmp_path, monkeypatch):
    head = f'out="moved"\n[bases]\nsmall="{house}/small"\nwide="{house}/wide"\n'
    text = (
        head + f'[adapters]\nsmall=["{house}/adapters/*"]\n[[moves]]\nfrom="small"\nto="wide"\nmethods=["cross-lora"]\n'
    )
    (tmp_path / "plan.toml").write_text(text)
    behind = batch_module.fit_behind

    def fill_once(method, source, target, adapter, moved, **given):
        rank = next(iter(adapter.modules.values())).rank
        return fill_device() if rank == 2 else behind(method, source, target, adapter, moved, **given)

    monkeypatch.setattr(batch_module, "fit_behind", fill_once)
    first, second = run_batch(read_plan(tmp_path / "plan.toml")).outcomes.values()
    assert (first.status, second.status) == ("failed", "done")
    assert first.text.startswith("not enough memory (")
    monkeypatch.undo()
    assert [one.status for one in run_batch(read_plan(tmp_path / "plan.toml")).outcomes.values()] == ["done", "kept"]
