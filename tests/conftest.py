"""Two CPU devices, strict dtype and rank promotion: what a user's machine may do must not slip through here.

Most of a run is compiling programs for arrays of a few numbers: without XLA's and LLVM's costly passes it takes two
thirds of the time. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 programs are compiled as a user's are; `.ci/run` does both.
"""

import os
import shutil
import tempfile

# One thread for each process: those of two processes that wait in a loop take each other's time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Texts that a tiny random model wrote are no use to the user whose cache they would land in.
os.environ["JCROSSLORA_CACHE"] = tempfile.mkdtemp(prefix="jcrosslora-tests-")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["JCROSSLORA_CACHE"], ignore_errors=True)


@pytest.fixture
def hooks():
    """A list of functions that the method `user_methods.Hooked` calls with its context for every adapter it moves."""
    from user_methods import HOOKS

    yield HOOKS
    HOOKS.clear()
