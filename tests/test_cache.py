"""Transfers through the cache: the same bytes with a cold one, a warm one and none; found by contents, not by name."""

import json
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from probe_bases import CORPUS, write_base
from safetensors.numpy import load_file, save_file
from tiny_bases import random_adapter, write_llama
from transfers import move_files

import jcrosslora as jcl
from jcrosslora.cache import Cache
from jcrosslora.cache.digests import FileDigests
from jcrosslora.cli.main import main
from jcrosslora.evidence.probes import Probes
from jcrosslora.evidence.probes.cache import keep_texts

SMALL = {"hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "intermediate": 48, "layers": 2, "vocab": 64}
WIDER = {**SMALL, "hidden": 40, "intermediate": 56, "layers": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    write_llama(folder / "source", seed=0, **SMALL)
    write_llama(folder / "target", seed=1, **WIDER)
    write_llama(folder / "twin", seed=2, **SMALL)
    for seed in (0, 1):
        adapter = random_adapter(jcl.open_base(folder / "source"), seed=seed)
        jcl.save_adapter(adapter, folder / f"adapter{seed}", base_name="org/src")
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("JCROSSLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "kept", limit=10**9)


def move(files, out, *, adapter=0, source="source", target="target", **settings):
    places = (files / f"adapter{adapter}", files / source, files / target, out / "moved")
    move_files(*map(str, places), rank=12, overwrite=True, **settings)
    return {path.name: path.read_bytes() for path in (out / "moved").iterdir()}


def forbid(monkeypatch, *names):
    def fails(*given, **settings):
        pytest.fail("this should have come from the cache")

    for name in names:
        monkeypatch.setattr(name, fails)


DECOMPOSE = ("jcrosslora.alignment.align.decompose", "jcrosslora.alignment.factor_cache.decompose")


def arrays_of(transport):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(transport.groups)]


def assert_same(one, two):
    assert one.recipe == two.recipe
    assert [group.pairs for group in one.groups] == [group.pairs for group in two.groups]
    for x, y in zip(arrays_of(one), arrays_of(two), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("method", "target"), [("cross-lora", "target"), ("lorasuite", "target"), ("prolora", "twin"), ("random", "target")]
)
def test_output_is_the_same_without_cache_with_cold_and_with_warm_cache(
    files, root, tmp_path, monkeypatch, method, target
):
    where = {"method": method, "target": target}
    none = move(files, tmp_path, cache=False, **where)
    assert not root.exists()
    cold = move(files, tmp_path, **where)
    second = move(files, tmp_path, adapter=1, cache=False, **where)
    forbid(
        monkeypatch, *DECOMPOSE, "jcrosslora.alignment.align.shared_vocabulary", "jcrosslora.alignment.align._fit_stack"
    )
    assert none == cold == move(files, tmp_path, **where)
    assert second == move(files, tmp_path, adapter=1, **where)


def test_damaged_entries_are_computed_again_with_the_same_output(files, root, tmp_path):
    first = move(files, tmp_path, method="cross-lora")
    # One that is gone, among others that are there.
    shutil.rmtree(sorted((root / "arrays" / "transport").iterdir())[0])
    assert first == move(files, tmp_path, method="cross-lora")
    for kind in ("transport", "factors", "vocabulary"):
        for path in (root / "arrays" / kind).glob("*/arrays/d/*"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    assert first == move(files, tmp_path, method="cross-lora")
    found = Cache(root)
    assert [found.verify(entry) for entry in found.entries()] == [None] * len(found.entries())


def test_factors_of_a_base_are_reused_in_another_pair(files, cache, monkeypatch):
    source, target, twin = (jcl.open_base(files / name) for name in ("source", "target", "twin"))
    jcl.align(source, target, rank=12, cache=cache)
    plain = jcl.align(twin, target, rank=12)
    decomposed = []
    from jcrosslora.alignment import factor_cache as factors

    real = factors.decompose
    monkeypatch.setattr(
        factors, "decompose", lambda stack, *a, **k: decomposed.append(stack.shape) or real(stack, *a, **k)
    )
    assert_same(plain, jcl.align(twin, target, rank=12, cache=cache))
    assert {shape[1:] for shape in decomposed} == {twin.modules[name].shape for name in twin.modules}


def test_only_missing_modules_are_decomposed(files, cache, monkeypatch):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    one = [0, None, None]
    jcl.align(source, target, rank=12, depth=one, cache=cache)
    plain = jcl.align(source, target, rank=12)
    from jcrosslora.alignment import factor_cache as factors

    rows, real = [], factors.decompose
    monkeypatch.setattr(factors, "decompose", lambda stack, *a, **k: rows.append(len(stack)) or real(stack, *a, **k))
    found = jcl.align(source, target, rank=12, cache=cache)
    assert_same(plain, found)
    assert sum(rows) < 7 * 3 + 7 * 3


def test_bases_are_identified_by_content_not_by_name(files, cache, tmp_path, monkeypatch):
    shutil.copytree(files / "source", tmp_path / "renamed")
    config = json.loads((tmp_path / "renamed" / "config.json").read_text())
    (tmp_path / "renamed" / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/other"}))
    source, renamed, target = map(jcl.open_base, (files / "source", tmp_path / "renamed", files / "target"))
    first = jcl.align(source, target, rank=12, cache=cache)
    with monkeypatch.context() as patched:
        forbid(patched, *DECOMPOSE)
        assert_same(first, jcl.align(renamed, target, rank=12, cache=cache))
        with pytest.raises(pytest.fail.Exception):
            jcl.align(source, target, rank=11, cache=cache)
    weights = load_file(tmp_path / "renamed" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] += 0.5
    save_file(weights, tmp_path / "renamed" / "model.safetensors")
    changed = jcl.open_base(tmp_path / "renamed")
    assert_same(jcl.align(changed, target, rank=12), jcl.align(changed, target, rank=12, cache=cache))
    with pytest.raises(AssertionError):
        assert_same(first, jcl.align(changed, target, rank=12, cache=cache))


def test_activation_maps_and_depth_map_are_cached_per_texts(tmp_path, cache, monkeypatch):
    source = jcl.open_base(write_base(tmp_path / "source", 60, seed=0, layers=3))
    target = jcl.open_base(write_base(tmp_path / "target", 20, bos=True, seed=1, hidden=56, head_dim=14, layers=2))
    settings = {"method": "theseus", "depth": "similar", "sources": [n for n in source.modules if "q_proj" in n]}
    probes = Probes(tuple(CORPUS), "given")
    plain = jcl.align(source, target, probes=probes, **settings)
    assert_same(plain, jcl.align(source, target, probes=probes, cache=cache, **settings))
    forbid(
        monkeypatch,
        "jcrosslora.evidence.moments.cross_moments",
        "jcrosslora.alignment.layer_similarity.layer_similarity",
    )
    warm = jcl.align(source, target, probes=probes, cache=cache, **settings)
    assert_same(plain, warm)
    assert warm.pairing == plain.pairing
    with pytest.raises(pytest.fail.Exception):
        jcl.align(source, target, probes=Probes(tuple(CORPUS[:2]), "given"), cache=cache, **settings)


def test_unwritable_cache_does_not_change_the_output(files, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    plain = move(files, tmp_path, method="cross-lora", cache=False)
    monkeypatch.setenv("JCROSSLORA_CACHE", str(tmp_path / "file"))
    assert plain == move(files, tmp_path, method="cross-lora")
    assert caplog.text.count("going on without it") == 1


def test_digest_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path, digests = tmp_path / "weights", FileDigests(tmp_path / "digests")
    path.write_bytes(b"abc")
    reads = []

    def read(value="11"):
        return digests.sha256s([path], lambda: reads.append(value) or [value])

    # Just written: another write within the same tick of the clock would not show.
    assert [read(), read()] == [["11"], ["11"]]
    assert len(reads) == 2
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**10)
    assert [read(), read(), read("22")] == [["11"]] * 3
    assert len(reads) == 3
    stat = path.stat()
    time.sleep(0.02)
    path.write_bytes(b"abd")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read("22") == ["22"]
    (record,) = (tmp_path / "digests").glob("*.json")
    record.write_text(record.read_text().replace("22", "33"))
    assert read("22") == ["22"]
    record.write_text("[" * 10_000)
    assert read("22") == ["22"]


def test_remembered_and_computed_digests_of_a_base_are_equal(files, tmp_path, monkeypatch):
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**10)
    digests = FileDigests(tmp_path / "digests")
    first = jcl.open_base(files / "source").digest(digests)
    forbid(monkeypatch, "jcrosslora.checkpoint.mapped.MappedFile.sha256")
    assert jcl.open_base(files / "source").digest(digests) == first
    monkeypatch.undo()
    assert jcl.open_base(files / "source").digest() == first


def run(capsys, *args):
    main(["cache", *args])
    return capsys.readouterr().out


def test_command_lists_verifies_and_clears(files, root, tmp_path, capsys):
    assert "0 entries" in run(capsys, "list")
    move(files, tmp_path, method="cross-lora")
    keep_texts("ab", ["a text"])
    listed = run(capsys, "list")
    for part in ("transport", "cross-lora, rank 12", "factors", "vocabulary", "texts that a base wrote", "MB"):
        assert part in listed
    assert "are whole" in run(capsys, "verify")
    damaged = next((root / "arrays" / "factors").glob("*/arrays/d/*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (root / "probes" / "ab.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "verify"])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "2 of" in printed.err
    assert "--remove" in printed.err
    assert str(Path("arrays") / "d") in printed.out
    assert "2 damaged ones were removed" in run(capsys, "verify", "--remove")
    assert "removed" not in run(capsys, "verify")
    keep_texts("cd", ["a text"])
    run(capsys, "clear", "--kind", "texts")
    assert list((root / "probes").iterdir()) == []
    assert "transport" in run(capsys, "list")
    run(capsys, "clear")
    assert "0 entries, 0.0 MB" in run(capsys, "list")
    assert Cache(root).entries() == []


def test_command_with_no_cache_writes_no_cache(files, root, tmp_path):
    given = [files / "adapter0", "--source", files / "source", "--target", files / "target", "--out", tmp_path / "o"]
    main(["transfer", *map(str, given), "--method", "cross-lora", "--rank", "12", "--no-cache"])
    assert not root.exists()


def test_tilde_in_the_environment_expands_to_home(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for name, value, root in (("JCROSSLORA_CACHE", "~/kept", "kept"), ("XDG_CACHE_HOME", "~/xdg", "xdg/jcrosslora")):
        monkeypatch.delenv("JCROSSLORA_CACHE", raising=False)
        monkeypatch.setenv(name, value)
        keep_texts("ab", ["a text"])
        assert (tmp_path / "me" / root / "probes" / "ab.json").exists()
        assert "1 entries removed" in run(capsys, "clear")
    assert [path.name for path in tmp_path.iterdir()] == ["me"]


def test_user_without_home_has_no_cache_and_gets_an_error(monkeypatch, capsys):
    monkeypatch.delenv("JCROSSLORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    assert jcl.open_cache() is None
    with pytest.raises(SystemExit):
        main(["cache", "list"])
    assert "no home folder" in capsys.readouterr().err
