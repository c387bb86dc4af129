"""Logs of figures: what is recorded, what a log is told of the machine, and what a fault of a log does."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import main
from probe_bases import CORPUS, write_base
from tiny_bases import open_pair, random_adapter

import jcrosslora as jcl
from jcrosslora.errors import UsageError
from jcrosslora.utils.logs import find_log, record

LOGS = "wandb", "trackio", "tensorboard"
RUN = """
import sys
from jcrosslora.utils.logs import log_to, record
with log_to(sys.argv[1], "my-run", {"method": "distill", "seed": 3}):
    for step in range(1, 4):
        record({"loss": 1 / step, "undefined": float("nan")}, step)
    record({"kept": 0.5})
"""


class Kept:
    """A log that keeps what it is told."""

    def __init__(self, fault=None):
        self.told, self.ended, self.fault = [], [], fault

    def log(self, step, values):
        if self.fault is not None:
            raise self.fault
        self.told.append((step, dict(values)))

    def finish(self, *, failed):
        self.ended.append(failed)


def events_in(folder):
    """The events of the one TensorBoard file below a folder."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    (path,) = (path for path in folder.rglob("*") if path.is_file())
    return path, [Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]


# What is recorded


def test_figures_have_a_step_that_never_falls_and_are_finite():
    log = Kept()
    with jcl.log_to(log):
        record({"loss": 2, "undefined": float("nan")}, 5)
        record({"kept": 0.5})
        record({"undefined": float("inf")}, 6)
        record({"loss": 1}, 1)
    record({"loss": 0}, 9)
    assert log.told == [(5, {"loss": 2.0}), (5, {"kept": 0.5}), (6, {"loss": 1.0})]
    assert log.ended == [False]


def test_a_log_is_told_that_the_work_failed():
    log = Kept()
    with pytest.raises(KeyError), jcl.log_to(log):
        raise KeyError
    assert log.ended == [True]


def test_a_fault_of_a_log_does_not_end_the_work_and_is_told_once(caplog):
    log = Kept(OSError("no route\nto host"))
    with jcl.log_to(log):
        record({"loss": 1}, 1)
        record({"loss": 1}, 2)
    assert [entry.getMessage() for entry in caplog.records] == [
        "the log has a fault (no route to host); the work goes on without it"
    ]


def test_a_transfer_records_its_figures(tmp_path):
    source, target = open_pair(tmp_path)
    log = Kept()
    with jcl.log_to(log):
        report = jcl.transfer(random_adapter(source), source, target, "pad-truncate", cache=False).report
    assert log.told == [(0, {"kept": report.kept, "left_behind": report.left_behind})]


@pytest.mark.full
def test_a_fit_records_each_look_as_the_report_has_it(tmp_path):
    source = jcl.open_base(write_base(tmp_path / "source", 30, bos=True, layers=2))
    target = jcl.open_base(write_base(tmp_path / "target", 90, layers=2, hidden=32, head_dim=8, seed=1))
    method = jcl.methods.Distill(completions=24, fit_rank=2, passes=1, answer_tokens=4, roles=("v_proj",))
    log = Kept()
    with jcl.log_to(log):
        moved = jcl.transfer(
            random_adapter(source), source, target, method, prompts=CORPUS, effect="never", cache=False
        )
    report = moved.report
    looks = [(values["completions"], values["divergence"]) for _, values in log.told if "divergence" in values]
    assert looks == [tuple(look) for look in report.curve]
    assert [step for step, _ in log.told] == sorted(step for step, _ in log.told)


# The command line


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A base and examples to train it on."""
    folder = tmp_path_factory.mktemp("training")
    write_base(folder / "base", 30, layers=2)
    (folder / "data.jsonl").write_text(json.dumps({"prompt": "a dog", "answer": "a cat"}) + "\n")
    return folder


def test_a_training_has_its_losses_and_settings_in_tensorboard(training, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    main(["train", str(training / "base"), "--data", str(training / "data.jsonl"), "--out", str(tmp_path / "trained"),
          "--steps", "3", "--batch", "1", "--rank", "2", "--log", "tensorboard"])  # fmt: skip
    path, events = events_in(tmp_path / "runs")
    assert path.parent.name == "trained"
    losses = [(event.step, value.tag) for event in events for value in event.summary.value if value.simple_value]
    assert losses == [(1, "loss"), (2, "loss"), (3, "loss")]
    text = events[1].summary.value[0].tensor.string_val[0].decode()
    assert '"base": "base"' in text
    assert str(tmp_path) not in text
    assert str(training) not in text


def test_bad_input_leaves_no_run_in_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    with pytest.raises(SystemExit):
        main(["transfer", "no-adapter", "--source", "no", "--target", "no", "--out", str(tmp_path / "x"),
              "--log", "tensorboard"])  # fmt: skip
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.full
def test_a_batch_has_a_run_for_each_job(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    source, _ = open_pair(tmp_path)
    jcl.save_adapter(random_adapter(source), tmp_path / "mine")
    (tmp_path / "plan.toml").write_text(
        'out = "moved"\n[bases]\na = "source"\nb = "target"\n[adapters]\na = ["mine"]\n'
        '[[moves]]\nfrom = "a"\nto = "b"\nmethods = ["pad-truncate", "random"]\ncache = false\n'
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    main(["batch", str(tmp_path / "plan.toml"), "--log", "tensorboard"])
    runs = sorted({path.parent for path in (tmp_path / "runs").rglob("events*")})
    assert len(runs) == 2
    for run in runs:
        _, events = events_in(run)
        assert "kept" in [value.tag for event in events for value in event.summary.value]


def test_a_log_of_a_batch_is_not_for_other_machines(tmp_path, capsys):
    source, _ = open_pair(tmp_path)
    jcl.save_adapter(random_adapter(source), tmp_path / "mine")
    (tmp_path / "plan.toml").write_text(
        'out = "moved"\n[bases]\na = "source"\nb = "target"\n[adapters]\na = ["mine"]\n'
        '[[moves]]\nfrom = "a"\nto = "b"\nmethods = ["random"]\n'
    )
    with pytest.raises(SystemExit):
        main(["batch", str(tmp_path / "plan.toml"), "--log", "tensorboard", "--ray", "local"])
    assert "leave one of them out" in capsys.readouterr().err


@pytest.mark.parametrize("log", LOGS)
def test_a_missing_package_is_named_before_any_work(training, tmp_path, monkeypatch, capsys, log):
    monkeypatch.setitem(sys.modules, log, None)
    for name in [name for name in sys.modules if name.startswith(f"{log}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit):
        main(["transfer", "no-adapter", "--source", "no", "--target", "no", "--out", str(tmp_path / "x"), "--log", log])
    printed = capsys.readouterr().err
    assert f"pip install 'jcrosslora[{log}]'" in printed
    assert printed.count("\n") == 1


def test_an_unknown_log_is_named():
    with pytest.raises(UsageError, match=r"log 'wandbb' is unknown \(did you mean 'wandb'\?\)"):
        find_log("wandbb")


def test_settings_for_others_to_see_hold_no_folders_and_no_server(tmp_path):
    settings = jcl.TransferSettings(
        adapter=str(tmp_path / "mine"), source="org/base", target=str(tmp_path / "t.gguf"), out=str(tmp_path / "out"),
        method="cross-lora", prompts=str(tmp_path / "p.txt"), overwrite=True,
    )  # fmt: skip
    found = settings.published()
    assert {"adapter": "mine", "source": "org/base", "target": "t.gguf", "prompts": "p.txt"}.items() <= found.items()
    assert found["method"] == "cross-lora"
    assert str(tmp_path) not in json.dumps(found)
    assert "out" not in found


# The packages


@pytest.mark.parametrize("log", LOGS)
def test_a_run_is_written_offline_and_does_not_tell_of_the_machine(tmp_path, log):
    if find_spec(log) is None:
        pytest.skip(f"{log} is not installed")
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path)}
    places |= {"TENSORBOARD_LOGGING_DIR": str(tmp_path), "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, log],
        env=os.environ | places,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""  # which is for a command's own JSON
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in written if path.suffix != ".log")
    for wanted in (b"loss", b"kept", b"distill"):
        assert wanted in content
    machine = [socket.gethostname(), str(Path.cwd()), sys.executable]
    assert not [word for word in machine if len(word) > 3 and word.encode() in content]
    assert not [path.name for path in written if path.name.endswith(socket.gethostname())]
    assert b"undefined" not in content
