"""Two CPU devices, strict dtype and rank promotion: what a user's machine may do must not slip through here.

Most of a run is compiling programs for arrays of a few numbers: without XLA's and LLVM's costly passes it takes two
thirds of the time. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 programs are compiled as a user's are; `.ci/run` does both.
Programs are shared by the processes of a run and kept for the next one, in `.pytest_cache`, which may be deleted.
"""

import os
import shutil
import tempfile
from pathlib import Path

# One thread for each process: those of two processes that wait in a loop take each other's time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Texts that a tiny random model wrote are no use to the user whose cache they would land in.
os.environ["JCROSSLORA_CACHE"] = tempfile.mkdtemp(prefix="jcrosslora-tests-")

import jax
import pytest

if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and jax.version.__version_info__ < (0, 11):
    # The older emitters compile in two thirds of the time; newer versions know neither them nor the flag. One piece
    # instead of up to 32 for as many cores takes another seventh off.
    _FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")

from jcrosslora.utils.cache import processor

# Compiled programs are memory maps, of which Linux gives a process 65,530.
MOST_MAPS = 30_000


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Forget compiled programs behind a module where there are many: XLA fails when no more can be mapped."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


# Bytes of kept programs from which they are all made anew: most are those of earlier versions of the code.
MOST_KEPT = 1 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Say where compiled programs are kept, in the environment: that of xdist's workers and of commands too."""
    if hasattr(config, "workerinput") or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    own = Path(os.environ["JCROSSLORA_CACHE"]) / "compiled"
    folder = config.cache.mkdir("compiled") / processor() if hasattr(config, "cache") else own
    if sum(path.stat().st_size for path in folder.glob("*")) > MOST_KEPT:
        shutil.rmtree(folder)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["JCROSSLORA_CACHE"], ignore_errors=True)


@pytest.fixture
def hooks():
    """A list of functions that the method `user_methods.Hooked` calls with the task for every adapter it moves."""
    from user_methods import HOOKS

    yield HOOKS
    HOOKS.clear()


@pytest.fixture(autouse=True)
def nothing_is_timed(request, monkeypatch):
    """For the display of a transfer every part takes a second: timing compiles them. The tests of the estimate time."""
    if request.module.__name__ != "test_estimate":
        monkeypatch.setattr("jcrosslora.session.timing._fastest", lambda *_: 1.0)


@pytest.fixture
def every_line(monkeypatch):
    """Show progress, with a line whenever something is done, not every 30 s."""
    from jcrosslora.utils import progress

    monkeypatch.setattr(progress.DISPLAY, "on", True)
    monkeypatch.setattr(progress.DISPLAY, "log_every", 0)
