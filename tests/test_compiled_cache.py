"""Test that compiled programs are cached and that damage to them is harmless."""

import os
import subprocess
import sys
import warnings

import compilation_share
import jax
import pytest
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora.utils.cache import keep_compiled


@pytest.mark.full
def test_compiled_programs_are_kept_and_damage_is_harmless(tmp_path):
    write_llama(tmp_path / "base", seed=0)
    jcl.save_adapter(random_adapter(jcl.open_base(tmp_path / "base")), tmp_path / "adapter", base_name="x")
    cache = tmp_path / "cache"

    def transfer(out: str, root) -> bytes:
        command = [sys.executable, "-m", "jcrosslora", "transfer", str(tmp_path / "adapter"), "--no-cache"]
        command += ["--source", str(tmp_path / "base"), "--target", str(tmp_path / "base"), "--method", "random"]
        command += ["--out", str(tmp_path / out)]
        # As a user's are: compiled as other tests do it, no program takes long enough to be kept on a fast machine.
        environment = {**os.environ, "JCROSSLORA_CACHE": str(root), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
        environment.pop("XLA_FLAGS", None)
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would be used instead
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return (tmp_path / out / "adapter_model.safetensors").read_bytes()

    first = transfer("first", cache)
    kept = [path for path in cache.glob("compiled/*/*") if path.name.endswith("-cache")]
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert transfer("again", cache) == first
    unwritable = tmp_path / "file"
    unwritable.write_text("not a folder")
    assert transfer("without", unwritable) == first


@pytest.mark.full
@pytest.mark.parametrize("arrays", [[], pytest.param(["--no-cache"], marks=pytest.mark.full)], ids=["cached", "anew"])
def test_second_move_of_a_pair_compiles_nothing(arrays, tmp_path):
    for name, seed in (("source", 0), ("target", 1)):
        write_llama(tmp_path / name, seed=seed)
    adapter = random_adapter(jcl.open_base(tmp_path / "source"))
    jcl.save_adapter(adapter, tmp_path / "adapter", base_name="x")
    command = ["transfer", str(tmp_path / "adapter"), "--out", "out", *arrays]
    command += ["--source", str(tmp_path / "source"), "--target", str(tmp_path / "target"), "--method"]
    if jax.default_backend() == "cpu":  # numpy makes the maps of this method there
        assert compilation_share.measure([*command, "cross-lora"], tmp_path / "numpy")["asked"] == 0
    first, second = (compilation_share.measure([*command, "random"], tmp_path / "cache") for _ in range(2))
    assert first["asked"] > first["found"]
    assert second["asked"] == second["found"]
    assert second["seconds"] < first["seconds"]


def test_a_cache_that_is_held_or_full_is_no_warning_and_damage_is(tmp_path, monkeypatch):
    monkeypatch.setenv("JCROSSLORA_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    entry = "Error reading persistent compilation cache entry for 'jit_step'"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        keep_compiled()
        for why in ("Timeout: The file lock '/cache/.lockfile' could not be acquired.", "JaxRuntimeError: damaged"):
            warnings.warn(f"{entry}: {why}", stacklevel=1)
        full = "FileNotFoundError: [Errno 2] No such file or directory"  # so JAX reports a full disk
        warnings.warn(f"{entry.replace('reading', 'writing')}: {full}", stacklevel=1)
    assert [str(one.message) for one in seen] == [f"{entry}: JaxRuntimeError: damaged"]
