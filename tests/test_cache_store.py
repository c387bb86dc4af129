"""Test the store alone: complete entries, detection of damage, the size limit, and concurrent processes."""

import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jcrosslora as jcl
from jcrosslora.utils import cache_entries
from jcrosslora.utils.cache import Cache, cache_limit

ROOT = Path(jcl.__file__).parents[1]


def content(seed=0, rows=6):
    rng = np.random.default_rng(seed)
    return {
        "left": rng.normal(size=(rows, 40)).astype(np.float32),
        "index": np.arange(7, dtype=np.int32),
        "empty": np.zeros((3, 0), np.float32),
    }


def keep(cache, key="ab", seed=0, kind="transport"):
    cache.save(kind, key, "a test", content(seed), {"terms": seed})


def holds(cache, key="ab", seed=0, kind="transport"):
    loaded = cache.load(kind, key)
    if loaded is None:
        return False
    assert loaded.facts == {"terms": seed}
    assert loaded.arrays.keys() == content().keys()
    for name, array in content(seed).items():
        assert loaded.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.arrays[name], array)
    return True


def files_of(cache, key="ab", kind="transport"):
    folder = cache.root / "arrays" / kind / key
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", limit=10**8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a cache with one entry, to be copied."""
    cache = Cache(tmp_path_factory.mktemp("whole"), limit=10**8)
    keep(cache)
    return cache


@pytest.fixture
def copied(whole, tmp_path):
    shutil.copytree(whole.root, tmp_path / "copy")
    return Cache(tmp_path / "copy", limit=10**8)


def test_saved_entry_is_found_and_no_other(cache):
    assert cache.load("transport", "ab") is None
    assert cache.facts("transport", "ab") is None
    assert not cache.root.exists()
    keep(cache)
    assert holds(cache)
    assert cache.facts("transport", "ab") == {"terms": 0}
    assert cache.load("factors", "ab") is None
    assert cache.keys("transport") == ["ab"]
    (entry,) = cache.entries()
    assert cache.verify(entry) is None
    assert entry.size == sum(path.stat().st_size for path in files_of(cache) if path.name != "manifest.json")
    assert list((cache.root / "arrays" / ".work").iterdir()) == []


def test_entry_may_have_facts_without_arrays(cache):
    cache.save("depth", "cd", "layers", {}, {"layers": [0, None]})
    loaded = cache.load("depth", "cd")
    assert loaded is not None
    assert (loaded.facts, loaded.arrays) == ({"layers": [0, None]}, {})


def test_an_array_in_two_entries_takes_the_disk_once_and_outlives_the_first(cache):
    large, small = np.arange(2**15, dtype=np.float32), np.arange(7, dtype=np.float32)
    cache.save("factors", "ab", "first", {"u": large, "s": small}, {})
    again = cache.load("factors", "ab").arrays["u"]
    cache.save(
        "transport", "cd", "second", {"left": large, "index": small, "right": large + 1, "copy": large.copy()}, {}
    )
    cache.save("transport", "ef", "third", {"left": again}, {})
    sharing = {path.name for path in files_of(cache, "cd") + files_of(cache, "ef") if path.stat().st_nlink > 1}
    assert sharing == {"left"}
    assert [cache.verify(entry) for entry in cache.entries()] == [None] * 3
    for entry in cache.entries("factors"):
        cache.remove(entry)
    assert [cache.load("transport", key).arrays["left"].tolist() for key in ("cd", "ef")] == [large.tolist()] * 2
    # Damage to the shared file shows in both entries.
    shared = next(path for path in files_of(cache, "cd") if path.name == "left")
    shared.write_bytes(bytes(shared.stat().st_size))
    assert [cache.load("transport", key) for key in ("cd", "ef")] == [None, None]
    # No file is left that a link could lead to.
    cache.save("factors", "gh", "fourth", {"u": large, "v": again}, {})
    np.testing.assert_array_equal(cache.load("factors", "gh").arrays["u"], large)


def test_first_of_two_writers_wins(cache):
    keep(cache, seed=0)
    keep(cache, seed=1)
    assert holds(cache, seed=0)


def test_background_writing_is_complete_and_in_order_at_the_end(cache):
    with cache.in_background():
        for number in range(5):
            keep(cache, key=f"k{number}", seed=number)
        keep(cache, key="k0", seed=9)
    assert cache.keys("transport") == [f"k{number}" for number in range(5)]
    assert all(holds(cache, key=f"k{number}", seed=number) for number in range(5))
    keep(cache, key="later")
    assert holds(cache, key="later")


def test_error_in_background_block_leaves_only_complete_entries(cache):
    def interrupted():
        with cache.in_background():
            for number in range(5):
                keep(cache, key=f"k{number}", seed=number)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(holds(cache, key=key, seed=int(key[1:])) for key in cache.keys("transport"))
    assert list((cache.root / "arrays" / ".work").iterdir()) == []
    keep(cache, key="later")
    assert holds(cache, key="later")


@pytest.mark.parametrize("change", ["flip", "cut", "extend", "remove", "empty"])
def test_any_change_of_any_file_is_detected_and_the_entry_can_be_saved_again(copied, change, caplog):
    rng = random.Random(change)
    number = 0
    while number < len(files_of(copied)):  # a new entry may have another number of files
        path = files_of(copied)[number]
        number += 1
        data = bytearray(path.read_bytes())
        if change == "remove" or (change in ("flip", "cut", "empty") and not data):
            path.unlink()
        elif change == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        else:
            path.write_bytes({"cut": data[:-1], "extend": data + b"\0", "empty": b""}[change])
        (entry,) = copied.entries()
        assert copied.verify(entry) is not None, path
        assert copied.load("transport", "ab") is None, path
        assert copied.keys("transport") == [], path
        keep(copied)
        assert holds(copied)
    assert "damaged and will be computed again" in caplog.text


def test_flipped_bytes_of_a_manifest_are_detected(copied):
    (entry,) = copied.entries()
    path = entry.path / "manifest.json"
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert copied.verify(entry) is not None, place
    path.write_bytes(data)
    assert copied.verify(entry) is None


def test_entry_of_another_key_and_unexpected_file_are_refused(copied):
    folder = copied.root / "arrays" / "transport"
    shutil.copytree(folder / "ab", folder / "cd")
    assert copied.load("transport", "cd") is None
    (folder / "ab" / "arrays" / "more").write_text("x")
    assert copied.load("transport", "ab") is None
    assert copied.keys("transport") == []


def test_folder_without_manifest_is_listed_and_removed(copied):
    (copied.root / "arrays" / "transport" / "ab" / "manifest.json").unlink()
    (entry,) = copied.entries()
    assert "manifest is missing" in entry.what
    assert copied.facts("transport", "ab") is None
    assert copied.entries() == []


def test_least_recently_used_entries_are_evicted_first(cache):
    for number, key in enumerate(["aa", "bb", "cc"]):
        keep(cache, key, number)
        manifest = cache.root / "arrays" / "transport" / key / "manifest.json"
        os.utime(manifest, (1000 + number, 1000 + number))
    assert holds(cache, "aa", 0)  # used now, so bb is the oldest
    (size,) = {entry.size for entry in cache.entries()}
    cache.limit = 3 * size + size // 2
    keep(cache, "dd", 3)
    assert cache.keys("transport") == ["aa", "cc", "dd"]
    cache.limit = size + size // 2
    keep(cache, "ee", 4)
    assert cache.keys("transport") == ["ee"]


def test_saving_reads_no_other_entry_while_there_is_room(cache, monkeypatch):
    read = []
    real = cache_entries.read_entry
    monkeypatch.setattr(cache_entries, "read_entry", lambda path, *rest: read.append(path.name) or real(path, *rest))
    keys = ["aa", "bb", "cc", "dd"]
    for key in keys:
        keep(cache, key)
    assert read == keys


def test_entry_larger_than_the_limit_is_not_saved(tmp_path):
    cache = Cache(tmp_path, limit=100)
    keep(cache)
    assert list(tmp_path.iterdir()) == []


def test_entry_removed_while_it_is_read_counts_as_missing(copied, monkeypatch):
    (entry,) = copied.entries()

    def gone(folder, shapes):
        copied.remove(entry)
        return read(folder, shapes)

    read = cache_entries.read_arrays
    monkeypatch.setattr(cache_entries, "read_arrays", gone)
    assert copied.load("transport", "ab") is None


def test_unwritable_folder_logs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file", limit=10**8)
    keep(cache)
    keep(cache, "cd")
    assert cache.load("transport", "ab") is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "going on without it" in caplog.text


def test_folder_without_permission_logs_one_warning(cache, caplog):
    keep(cache)
    user, folder = os.geteuid(), cache.root / "arrays"
    folder.chmod(0)
    if user == 0:  # root ignores modes
        os.seteuid(65534)
    try:
        assert cache.facts("transport", "ab") is None
        assert cache.load("transport", "ab") is None
        keep(cache, "cd")
        assert cache.entries() == []
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert cache.load("transport", "ab") is not None


def test_full_disk_logs_one_warning_and_leaves_no_files(cache, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses larger files, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        cache.save("transport", "ab", "large", content(rows=4000), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "going on without it" in caplog.text
    assert cache.entries() == []
    assert list((cache.root / "arrays" / ".work").iterdir()) == []


@pytest.mark.parametrize(("stated", "size"), [("500MB", 500 * 10**6), ("1.5g", 1_500_000_000), ("7", 7), ("0", 0)])
def test_limit_is_read_from_the_environment(monkeypatch, stated, size):
    monkeypatch.setenv("JCROSSLORA_CACHE_SIZE", stated)
    assert cache_limit() == size
    assert (jcl.open_cache() is None) == (size == 0)


@pytest.mark.parametrize("stated", ["much", "1" + 400 * "0", "-1"])
def test_invalid_limit_in_the_environment_is_an_error(monkeypatch, stated):
    monkeypatch.setenv("JCROSSLORA_CACHE_SIZE", stated)
    with pytest.raises(jcl.UsageError, match=rf"'{stated}', expected a number of bytes"):
        jcl.open_cache()


WRITER = """
import sys
import numpy as np
from jcrosslora.utils.cache import Cache
cache = Cache(sys.argv[1], limit=int(sys.argv[2]))
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    key = f"{number % 3:02d}"
    arrays = {"x": np.full((200, 100), number % 3, np.float32), "y": np.arange(5)}
    cache.save("transport", key, "a test", arrays, {})
    loaded = cache.load("transport", key)
    if loaded is not None:
        assert (loaded.arrays["x"] == number % 3).all()
    if number % 4 == 3:
        for entry in cache.entries():
            cache.remove(entry)
"""


def start(cache, rounds, limit=10**8):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WRITER, str(cache.root), str(limit), str(rounds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.full
def test_two_processes_can_write_read_and_remove_the_same_entries(cache):
    jobs = [start(cache, 24, limit=200_000) for _ in range(2)]
    ends = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], ends
    assert [error for _, error in ends if "damaged" in error or "cannot" in error] == []
    assert all(cache.verify(entry) is None for entry in cache.entries())
    assert list((cache.root / "arrays" / ".work").iterdir()) == []


@pytest.mark.full
def test_store_works_after_a_writer_is_killed(cache):
    rng = random.Random(0)
    for _ in range(3):
        job = start(cache, 10**6)
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.2, 1.2))
        job.send_signal(signal.SIGKILL)
        job.communicate()
        assert all(cache.verify(entry) is None for entry in cache.entries())
    work = cache.root / "arrays" / ".work"
    keep(cache, "zz")
    assert holds(cache, "zz")
    assert list(work.iterdir()) == []
