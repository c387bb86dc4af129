"""Test that two processes write what one writes, read only their own parts, and end together."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import main
from test_transfer import WIDER
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora.utils import hosts
from jcrosslora.utils.hosts import join

PLAN = """
out = "moved"
bases = { source = "source", target = "target" }
adapters = { source = ["adapter"] }
moves = [{ from = "source", to = ["target"], methods = ["copy"] }]
"""
# Seconds; the session takes a few, but more on a busy machine.
PATIENCE = 300


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Run two processes; return their folder, their results, and (exit code, stderr) of each."""
    folder = tmp_path_factory.mktemp("hosts")
    write_llama(folder / "source", seed=0)
    write_llama(folder / "target", seed=1, first_token=20, **{**WIDER, "layers": 3})
    (folder / "plan.toml").write_text(PLAN)
    adapter = random_adapter(jcl.open_base(folder / "source"), roles={"q_proj"})
    jcl.save_adapter(adapter, folder / "adapter", base_name="org/src")
    script, port = Path(__file__).with_name("host_session.py"), free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_NUM_CPU_DEVICES": str(jax.local_device_count()),
    }
    with ExitStack() as stack:
        children = []
        for number in range(2):
            child = subprocess.Popen(
                [sys.executable, str(script), str(folder), str(number), str(port)],
                # Separate caches, as on two hosts.
                env={**environment, "JCROSSLORA_CACHE": str(folder / f"cache{number}")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            children.append(stack.enter_context(child))
            stack.callback(child.kill)
        ends = [(child, child.communicate(timeout=PATIENCE)[1]) for child in children]
    found = [folder / f"found{number}.json" for number in range(2)]
    assert all(path.exists() for path in found), "\n".join(end[1] for end in ends)
    return folder, [json.loads(path.read_text()) for path in found], [(child.returncode, text) for child, text in ends]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.full
def test_two_processes_write_the_same_files_as_one(session, monkeypatch):
    folder, found, _ = session
    given = [str(folder / "adapter"), "--source", str(folder / "source"), "--target", str(folder / "target")]
    # The second run uses the cache of the first of the two processes.
    for cache, name in (("cache", "first"), ("cache0", "again")):
        monkeypatch.setenv("JCROSSLORA_CACHE", str(folder / cache))
        main(["transfer", *given, "--method", "cross-lora", "--out", str(folder / "alone" / name)])
        assert files_of(folder / name) == files_of(folder / "alone" / name)
    assert len(list((folder / "cache0").glob("arrays/transport/*"))) == 1
    here = jax.local_device_count()
    assert found[0]["devices"] == [here, 2 * here, 2]
    bases = [jcl.open_base(folder / name) for name in ("source", "target")]
    transport = jcl.align(*bases, method="random", sources=jcl.load_adapter(folder / "adapter").modules)
    alone = [np.asarray(leaf) for group in transport.groups for leaf in jax.tree.leaves(group)]
    for number in range(2):
        with np.load(folder / f"transport{number}.npz") as together:
            assert len(together.files) == len(alone)
            for name, array in zip(together.files, alone, strict=True):
                np.testing.assert_array_equal(together[name], array)


@pytest.mark.full
def test_each_process_reads_only_its_own_part_and_the_first_writes(session):
    folder, found, _ = session
    names = [one["read"]["weights"] for one in found]
    # Three modules, of the same names in both bases.
    assert [[name.split(".")[2] for name in own] for own in names] == [["0", "1", "0", "1"], ["2", "2"]]
    assert [one["read"]["digests"] for one in found] == [["sha256s", "sha256s"], []]
    assert all(one["read again"] == [] for one in found)
    assert list((folder / "cache0").glob("arrays/transport/*"))
    assert list((folder / "cache0").glob("digests/*"))
    assert not (folder / "cache1" / "arrays").exists()
    assert not (folder / "cache1" / "digests").exists()


@pytest.mark.full
def test_error_in_one_process_is_raised_in_all(session):
    folder, (first, second), ends = session
    assert second["one fails"].startswith("AdapterError: ")
    assert first["one fails"].startswith("HostError: process 1 of 2 failed")
    assert second["one fails"] in first["one fails"]
    assert first["first fails"].startswith("OutputError: ")
    assert first["first fails"] in second["first fails"]
    for one in (first, second):
        assert "were not given the same bases, adapter and settings" in one["unlike"]
        assert "MethodError: method theseus runs the bases on text" in one["runs bases"]
        assert "UsageError: a batch cannot run in several connected processes" in one["batch"]
    assert not (folder / "bad").exists()
    # The second was killed in the middle of a transfer.
    (code, text), (killed, _) = ends
    assert killed < 0
    assert code == 2, text
    assert "another of the 2 processes ended" in text
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost", 2, 0), "not of the form HOST:PORT"),
        (("localhost:1", None, 0), "process 0 of None does not exist"),
        (("localhost:1", 2, 2), "process 2 of 2 does not exist"),
        ((None, 2, None), "without a coordinator"),
    ],
)
def test_invalid_process_arguments_are_refused(given, message):
    with pytest.raises(jcl.UsageError, match=message):
        join(*given)


def test_one_process_needs_no_communication():
    with hosts.together():
        assert (hosts.count(), hosts.is_first(), hosts.own_part([5, 6, 7])) == (1, True, [5, 6, 7])
        assert hosts.exchange("x", 3) == [3]
        arrays, labels = hosts.gather("x", {"a": np.arange(6.0).reshape(3, 2)}, [["k", "l", "m"]], 3)
        np.testing.assert_array_equal(arrays["a"], np.arange(6.0).reshape(3, 2))
        assert labels == [["k", "l", "m"]]


@pytest.mark.slow
def test_two_processes_with_one_device_each_write_the_same_files_as_one(session, tmp_path):
    folder, _, _ = session
    command = [
        sys.executable,
        "-m",
        "jcrosslora.cli.main",
        "transfer",
        str(folder / "adapter"),
        "--method",
        "cross-lora",
    ]
    command += ["--source", str(folder / "source"), "--target", str(folder / "target"), "--no-cache", "--out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_NUM_CPU_DEVICES": "1"}
    joined = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    runs = [[tmp_path / "one" / "out"], *([tmp_path / "two" / "out", *joined, str(number)] for number in range(2))]
    children = [subprocess.Popen([*command, *map(str, run)], env=environment) for run in runs]
    assert [child.wait(PATIENCE) for child in children] == [0, 0, 0]
    assert files_of(tmp_path / "one" / "out") == files_of(tmp_path / "two" / "out")
