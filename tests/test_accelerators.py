"""Every compiled program of a move lowers for GPUs and TPUs, which shows what has no counterpart there.

That it runs there, and how fast, can only be seen there: `tools/bench_gpu.py`.
"""

import re

import jax
import jax.export
import jax.numpy as jnp
import jax.scipy.linalg
import pytest
from program_shapes import Program, Shapes, compiled_functions, name_of, programs

import jcrosslora as jcl

PLATFORMS = ["cuda", "rocm", "tpu"]


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    """What a CPU does in another way is done as an accelerator does it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def export(program: Program) -> None:
    with jax.enable_x64(program.float64):
        made = jax.export.export(program.function, platforms=PLATFORMS)(*program.given, **program.named)
    only_here = re.findall(r"custom_call @((?:lapack|ducc|cpu|xla_python|xla_ffi_python)\w*)", made.mlir_module())
    assert not only_here, f"custom calls of CPUs: {set(only_here)}"


@pytest.mark.full
def test_every_program_of_a_move_lowers_for_accelerators():
    failed, seen = {}, set()
    for program in programs():
        seen.add(name_of(program.function))
        try:
            export(program)
        except Exception as error:
            failed[f"{name_of(program.function)} {program.label}"] = f"{type(error).__name__}: {str(error)[:300]}"
    assert not failed
    assert seen == compiled_functions()


@pytest.mark.full
@pytest.mark.parametrize("name", ["qwen3_5_moe", "granite-experts", "lfm2_moe", "gemma4"])
def test_mixers_and_experts_lower_for_accelerators(name):
    pytest.importorskip("torch")
    from dense_models import random_model
    from hybrid_models import HYBRIDS

    for program in Shapes(jcl.open_base(random_model(*HYBRIDS[name]))).passes():
        export(program)


@pytest.mark.parametrize(
    "only_here",
    [
        jax.scipy.linalg.schur,
        lambda x: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((3, 3), jnp.float32), x),
        lambda x: jax.ffi.ffi_call("lapack_spotrf_ffi", jax.ShapeDtypeStruct((3, 3), jnp.float32))(x),
    ],
    ids=["LAPACK alone", "host callback", "custom call"],
)
def test_what_has_no_counterpart_there_is_found(only_here):
    with pytest.raises((NotImplementedError, ValueError, AssertionError), match=r"not found|callback|custom calls of"):
        export(Program(jax.jit(only_here), (jax.ShapeDtypeStruct((3, 3), jnp.float32),)))
