"""Written texts are kept on disk by content, and nothing that is wrong with the disk gets in the way."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_bases import random_adapter, write_llama, write_tokenizer

from jcrosslora import written_probes
from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import open_base
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import probes as writing
from jcrosslora.evaluate.probes import TextSettings, find_texts, keep_texts, texts_key

TEXTS = ["one text", "zwei\nZeilen — ‘mit’ \u2028 \U0001f600", "half \ud800", ""]
SETTINGS = TextSettings(2, 8)


@pytest.fixture
def base(tmp_path):
    return open_base(write_llama(tmp_path / "base"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JCROSSLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "probes"


@pytest.fixture
def writes(monkeypatch):
    """Calls of the writing itself, which gives two texts that tell the calls apart."""
    calls = []

    def write(base, settings, adapter):
        calls.append(settings)
        return [f"call {len(calls)} text {number}" for number in range(settings.count)]

    monkeypatch.setattr(writing, "write_texts", write)
    return calls


def test_cached_texts_equal_generated_texts(folder):
    assert find_texts("ab") is None
    keep_texts("ab", TEXTS)
    assert find_texts("ab") == TEXTS
    assert find_texts("cd") is None
    assert [path.name for path in folder.iterdir()] == ["ab.json"]


def test_texts_are_generated_once(base, folder, writes):
    first = written_probes(base, 2, length=8)
    again = written_probes(open_base(base.path), 2, length=8)
    assert len(writes) == 1
    assert (again, again.digest()) == (first, first.digest())
    written_probes(base, 2, length=8, adapter=random_adapter(base))
    assert len(writes) == 2
    assert len(list(folder.iterdir())) == 2


def test_settings_out_of_range_are_refused_with_a_cache(base, folder):
    for settings in ({"seed": -1}, {"temperature": float("nan")}, {"count": 0}, {"seed": np.int64(-1)}):
        with pytest.raises(UsageError):
            written_probes(base, **settings)
    assert not folder.exists()


def test_every_setting_changes_the_key(base):
    wanted = texts_key(base, SETTINGS, None)
    assert texts_key(open_base(base.path), SETTINGS, None) == wanted
    others = [(3, 8, 1.0, 0), (2, 9, 1.0, 0), (2, 8, 0.5, 0), (2, 8, 1.0, 1), (8, 2, 1.0, 0)]
    keys = {texts_key(base, TextSettings(*settings), None) for settings in others}
    assert len(keys | {wanted}) == len(others) + 1


def other_weights(folder: Path) -> None:
    write_llama(folder, seed=1)


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))


def other_tokenizer(folder: Path) -> None:
    write_tokenizer(folder, 96, first_token=3)


def other_special_tokens(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize("change", [other_weights, other_config, other_tokenizer, other_special_tokens])
def test_every_property_of_the_base_changes_the_key(base, tmp_path, change):
    shutil.copytree(base.path, tmp_path / "other")
    key = partial(texts_key, settings=SETTINGS, adapter=None)
    assert key(open_base(tmp_path / "other")) == key(base)
    change(tmp_path / "other")
    assert key(open_base(tmp_path / "other")) != key(base)


def test_procedure_and_platform_change_the_key(base, monkeypatch):
    keys = {texts_key(base, SETTINGS, None)}
    with monkeypatch.context() as patch:
        patch.setattr(writing, "PROCEDURE", writing.PROCEDURE + 1)
        keys.add(texts_key(base, SETTINGS, None))
    monkeypatch.setattr(writing.jax, "default_backend", lambda: "gpu")
    keys.add(texts_key(base, SETTINGS, None))
    assert len(keys) == 3


def test_sampling_dtype_changes_the_key(base, monkeypatch):
    keys = set()
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(writing, "fast_dtype", lambda dtype=dtype: jnp.dtype(dtype))
        keys.add(texts_key(base, SETTINGS, None))
    assert len(keys) == 2


def test_factors_of_an_adapter_change_the_key(base):
    adapter = random_adapter(base, roles={"q_proj", "v_proj"})
    name, factors = next(iter(adapter.modules.items()))
    rest = {other: value for other, value in adapter.modules.items() if other != name}

    def changed(**change) -> Adapter:
        return Adapter(modules={**rest, name: dataclasses.replace(factors, **change)})

    def key(adapter: Adapter | None) -> str:
        return texts_key(base, SETTINGS, adapter)

    assert key(changed()) == key(adapter)  # the same modules in another order
    others = [None, changed(scale=0.5), changed(a=factors.a * 1.001), changed(b=-factors.b), Adapter(modules=rest)]
    others.append(Adapter(modules={**rest, f"{name}_other": factors}))
    assert len({key(other) for other in (*others, adapter)}) == len(others) + 1


def damaged(content: bytes) -> list[bytes]:
    record = json.loads(content)
    return [
        b"",
        content[:-20],
        content.replace(b"text 1", b"text 7"),
        b"\xff\xfe" + content,
        b"[" * 100_000,
        b"null",
        b"[]",
        json.dumps(record | {"texts": None}).encode(),
        json.dumps(record | {"key": "another"}).encode(),
        json.dumps({key: value for key, value in record.items() if key != "sha256"}).encode(),
    ]


def test_damaged_file_is_generated_again(base, folder, writes):
    written_probes(base, 2, length=8)
    (path,) = folder.iterdir()
    for number, content in enumerate(damaged(path.read_bytes()), 2):
        path.write_bytes(content)
        assert written_probes(base, 2, length=8).texts[0] == f"call {number} text 0"
        assert written_probes(base, 2, length=8).texts[0] == f"call {number} text 0"
        assert len(writes) == number
    assert list(folder.iterdir()) == [path]


def block_by_a_file(folder: Path, base) -> None:
    folder.parent.mkdir()
    folder.write_text("not a folder")


def block_by_a_folder(folder: Path, base) -> None:
    key = texts_key(base, SETTINGS, None)
    (folder / f"{key}.json" / "inside").mkdir(parents=True)


@pytest.mark.parametrize("block", [block_by_a_file, block_by_a_folder])
def test_texts_are_generated_without_a_cache_folder(base, folder, writes, block):
    block(folder, base)
    for number in (1, 2):
        assert written_probes(base, 2, length=8).texts == (f"call {number} text 0", f"call {number} text 1")
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not hold for this user")
def test_read_only_folder_is_left_unchanged(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    keep_texts("ab", TEXTS)
    assert find_texts("ab") is None
    folder.chmod(0o700)


def test_full_disk_leaves_no_file(folder, monkeypatch):
    write = Path.write_bytes

    def fails(path: Path, content: bytes) -> None:
        write(path, content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)
    keep_texts("ab", TEXTS)
    assert list(folder.iterdir()) == []


def test_environment_variable_moves_the_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("JCROSSLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    keep_texts("ab", TEXTS)
    assert (tmp_path / "xdg" / "jcrosslora" / "probes" / "ab.json").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    keep_texts("ab", TEXTS)
    assert (tmp_path / "home" / ".cache" / "jcrosslora" / "probes" / "ab.json").is_file()

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    keep_texts("ab", TEXTS)
    assert find_texts("ab") is None


HAMMER = """
import sys
from jcrosslora.evaluate.probes import find_texts, keep_texts
texts = [sys.argv[1] * 50_000, "x"]
for _ in range(60):
    keep_texts("ab", texts)
    found = find_texts("ab")
    assert found is not None and len(set(found[0])) == 1, found
"""


def test_two_processes_share_the_folder(folder):
    environment = os.environ | {"PYTHONPATH": str(Path(writing.__file__).parents[2])}
    jobs = [subprocess.Popen([sys.executable, "-c", HAMMER, letter], env=environment) for letter in "ab"]
    assert [job.wait(timeout=60) for job in jobs] == [0, 0]
    assert [path.name for path in folder.iterdir()] == ["ab.json"]
