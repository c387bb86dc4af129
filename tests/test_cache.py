"""Transfers through the cache: the same bytes with a cold one, a warm one and none; found by contents, not by name."""

import json
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import main
from full_set import full_except
from probe_bases import CORPUS, write_base
from recording import recorded
from safetensors.numpy import load_file, save_file
from tiny_bases import random_adapter, write_llama
from transfers import move_files

import jcrosslora as jcl
from jcrosslora import Probes
from jcrosslora.evaluate.probes import keep_texts
from jcrosslora.methods import METHODS, CrossLoRA
from jcrosslora.utils.digests import FileDigests

SMALL = {"hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "intermediate": 48, "layers": 2, "vocab": 64}
RANK_12 = CrossLoRA(svd_rank=12)
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
    return jcl.Cache(tmp_path / "kept", limit=10**9)


def move(files, out, *, adapter=0, source="source", target="target", **settings):
    places = (files / f"adapter{adapter}", files / source, files / target, out / "moved")
    move_files(*map(str, places), overwrite=True, **settings)
    return {path.name: path.read_bytes() for path in (out / "moved").iterdir()}


def opened(*folders):
    """Bases, and the names of all tensors that are read of any of them."""
    pairs = [recorded(jcl.open_base(folder)) for folder in folders]
    return [base for base, _ in pairs], lambda: [name for _, store in pairs for name in store.read if "." in name]


def mark(cache):
    """Double the left singular vectors of all factors that are kept: what is made of them is doubled, exactly."""
    for entry in [entry for entry in cache.entries() if entry.kind == "factors"]:
        loaded = cache.load("factors", entry.key)
        shutil.rmtree(entry.path)
        arrays = {name: 2 * array if name == "u" else array for name, array in loaded.arrays.items()}
        cache.save("factors", entry.key, entry.what, arrays, loaded.facts)


def outer(transport):
    """For each target module the left side of its outer map and the right one."""
    return {
        pair.target: (np.asarray(p_out.left)[row], np.asarray(p_out.right)[row])
        for group in transport.groups
        for ((p_out, _),) in [group.terms]
        for row, pair in enumerate(group.pairs)
    }


def arrays_of(transport):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(transport.groups)]


def assert_same(one, two):
    assert vars(one.recipe) == vars(two.recipe)
    assert [group.pairs for group in one.groups] == [group.pairs for group in two.groups]
    for x, y in zip(arrays_of(one), arrays_of(two), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("method", "target"),
    full_except(
        [("cross-lora", "target"), ("prolora", "twin"), ("random", "target")],
        [("cross-lora", "target")],
    ),
)
def test_output_is_the_same_without_cache_with_cold_and_with_warm_cache(files, root, tmp_path, method, target):
    where = {"method": method, "target": target, "svd_rank": 12}
    none = move(files, tmp_path, cache=False, **where)
    assert not root.exists()
    cold = move(files, tmp_path, **where)
    second = move(files, tmp_path, adapter=1, cache=False, **where)
    assert none == cold == move(files, tmp_path, **where)
    assert second == move(files, tmp_path, adapter=1, **where)
    bases, read = opened(files / "source", files / target)
    wanted = METHODS[method](**{key: value for key, value in where.items() if key == "svd_rank"})
    jcl.transfer(files / "adapter0", *bases, wanted)
    assert not read()


def test_damaged_entries_are_computed_again_with_the_same_output(files, root, tmp_path):
    first = move(files, tmp_path, method="cross-lora", svd_rank=12)
    # One that is gone, among others that are there.
    shutil.rmtree(sorted((root / "arrays" / "transport").iterdir())[0])
    assert first == move(files, tmp_path, method="cross-lora", svd_rank=12)
    for kind in ("transport", "factors", "vocabulary"):
        for path in (root / "arrays" / kind).glob("*/arrays/*"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    assert first == move(files, tmp_path, method="cross-lora", svd_rank=12)
    found = jcl.Cache(root)
    assert [found.verify(entry) for entry in found.entries()] == [None] * len(found.entries())


@pytest.mark.full
def test_factors_of_a_base_are_reused_in_another_pair(files, tmp_path):
    source, target, twin = (jcl.open_base(files / name) for name in ("source", "target", "twin"))
    plain = jcl.align(twin, target, RANK_12)
    cache, marked = jcl.Cache(tmp_path / "kept"), jcl.Cache(tmp_path / "marked")
    for each in (cache, marked):
        jcl.align(source, target, RANK_12, cache=each)
    mark(marked)
    assert_same(plain, jcl.align(twin, target, RANK_12, cache=cache))
    # The factors of the target are those that are kept, the twin's are new.
    found = outer(jcl.align(twin, target, RANK_12, cache=marked))
    for name, (left, right) in outer(plain).items():
        np.testing.assert_array_equal(found[name][0], 2 * left)
        np.testing.assert_array_equal(found[name][1], right)


@pytest.mark.full
def test_only_missing_modules_are_decomposed(files, tmp_path):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    plain = jcl.align(source, target, RANK_12)
    cache, marked = jcl.Cache(tmp_path / "kept"), jcl.Cache(tmp_path / "marked")
    for each in (cache, marked):
        jcl.align(source, target, RANK_12, depth=[0, None, None], cache=each)
    mark(marked)
    assert_same(plain, jcl.align(source, target, RANK_12, cache=cache))
    found = outer(jcl.align(source, target, RANK_12, cache=marked))
    kept = {name for name, (left, _) in outer(plain).items() if np.array_equal(found[name][0], 2 * left)}
    assert kept == {name for name in target.modules if ".0." in name}
    fresh = {name for name, (left, _) in outer(plain).items() if np.array_equal(found[name][0], left)}
    assert fresh == target.modules.keys() - kept


@pytest.mark.full
def test_bases_are_identified_by_content_not_by_name(files, cache, tmp_path):
    shutil.copytree(files / "source", tmp_path / "renamed")
    config = json.loads((tmp_path / "renamed" / "config.json").read_text())
    (tmp_path / "renamed" / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/other"}))
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    first = jcl.align(source, target, RANK_12, cache=cache)
    (renamed, other), read = opened(tmp_path / "renamed", files / "target")
    assert_same(first, jcl.align(renamed, other, RANK_12, cache=cache))
    assert not read()
    jcl.align(renamed, other, CrossLoRA(svd_rank=11), cache=cache)
    assert read()
    weights = load_file(tmp_path / "renamed" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] += 0.5
    save_file(weights, tmp_path / "renamed" / "model.safetensors")
    changed = jcl.open_base(tmp_path / "renamed")
    assert_same(jcl.align(changed, target, RANK_12), jcl.align(changed, target, RANK_12, cache=cache))
    with pytest.raises(AssertionError):
        assert_same(first, jcl.align(changed, target, RANK_12, cache=cache))


@pytest.mark.full
def test_activation_maps_are_cached_per_texts(tmp_path, cache):
    folders = [
        write_base(tmp_path / "source", 60, seed=0, layers=3),
        write_base(tmp_path / "target", 20, bos=True, seed=1, hidden=56, head_dim=14, layers=2),
    ]
    (source, target), _ = opened(*folders)
    settings = {"method": "theseus", "sources": [n for n in source.modules if "q_proj" in n]}
    probes = Probes(tuple(CORPUS), "given")
    plain = jcl.align(source, target, probes=probes, **settings)
    assert_same(plain, jcl.align(source, target, probes=probes, cache=cache, **settings))
    bases, read = opened(*folders)
    warm = jcl.align(*bases, probes=probes, cache=cache, **settings)
    assert_same(plain, warm)
    assert warm.pairing == plain.pairing
    assert not read()  # neither base was run
    jcl.align(*bases, probes=Probes(tuple(CORPUS[:2]), "given"), cache=cache, **settings)
    assert read()


def test_unwritable_cache_does_not_change_the_output(files, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    plain = move(files, tmp_path, method="cross-lora", svd_rank=12, cache=False)
    monkeypatch.setenv("JCROSSLORA_CACHE", str(tmp_path / "file"))
    assert plain == move(files, tmp_path, method="cross-lora", svd_rank=12)
    assert caplog.text.count("going on without it") == 1


def test_digest_is_remembered_until_the_file_changes(tmp_path):
    ahead = [0]
    path, digests = tmp_path / "weights", FileDigests(tmp_path / "digests", lambda: time.time_ns() + ahead[0])
    path.write_bytes(b"abc")
    reads = []

    def read(value="11"):
        return digests([path], lambda: reads.append(value) or [value])

    # Just written: another write within the same tick of the clock would not show.
    assert [read(), read()] == [["11"], ["11"]]
    assert len(reads) == 2
    ahead[0] = 10**10
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


def test_remembered_and_computed_digests_of_a_base_are_equal(files, tmp_path):
    digests = FileDigests(tmp_path / "digests", lambda: time.time_ns() + 10**10)
    first = jcl.open_base(files / "source").digest(digests)
    base, store = recorded(jcl.open_base(files / "source"))
    assert base.digest(digests) == first
    assert "sha256s" not in store.read
    assert jcl.open_base(files / "source").digest() == first


def run(capsys, *args):
    main(["cache", *args])
    return capsys.readouterr().out


def test_command_lists_verifies_and_clears(files, root, tmp_path, capsys):
    assert "0 entries" in run(capsys, "list")
    move(files, tmp_path, method="cross-lora", svd_rank=12)
    keep_texts("ab", ["a text"])
    listed = run(capsys, "list")
    for part in ("transport", "cross-lora, rank 12", "factors", "vocabulary", "texts that a base wrote", "MB"):
        assert part in listed
    assert "are whole" in run(capsys, "verify")
    damaged = next((root / "arrays" / "factors").glob("*/arrays/*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (root / "probes" / "ab.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "verify"])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "2 of" in printed.err
    assert "--remove" in printed.err
    assert str(Path("arrays") / damaged.name) in printed.out
    assert "2 damaged ones were removed" in run(capsys, "verify", "--remove")
    assert "removed" not in run(capsys, "verify")
    keep_texts("cd", ["a text"])
    run(capsys, "clear", "--kind", "texts")
    assert list((root / "probes").iterdir()) == []
    assert "transport" in run(capsys, "list")
    run(capsys, "clear")
    assert "0 entries, 0.0 MB" in run(capsys, "list")
    assert jcl.Cache(root).entries() == []


def test_command_with_no_cache_writes_no_cache(files, root, tmp_path):
    given = [files / "adapter0", "--source", files / "source", "--target", files / "target", "--out", tmp_path / "o"]
    main(["transfer", *map(str, given), "--method", "cross-lora", "--svd-rank", "12", "--no-cache"])
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
