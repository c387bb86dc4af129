"""Updates of fused modules are split and merged without changing a number of dW."""

import numpy as np
import pytest
from adapter_folders import base_of, delta, matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from jcrosslora.adapter import Adapter, LoRAFactors, fuse, load_adapter, save_adapter, split_fused
from jcrosslora.errors import AdapterError

FUSED = {"l.qkv": (("l.q", 0, 4), ("l.k", 4, 6), ("l.v", 6, 8))}
ROWS = {part: (start, stop) for part, start, stop in FUSED["l.qkv"]}


def part(name: str, rank: int, seed: int, scale: float = 2.0) -> LoRAFactors:
    start, stop = ROWS[name]
    # Small whole numbers make every product and sum exact.
    rng = np.random.default_rng(seed)
    a = rng.integers(-4, 5, (rank, 5)).astype(np.float32)
    return LoRAFactors(a=a, b=rng.integers(-4, 5, (stop - start, rank)).astype(np.float32), scale=scale)


def dense(modules: dict[str, LoRAFactors]) -> np.ndarray:
    full = np.zeros((8, 5))
    for name, factors in modules.items():
        full[slice(*ROWS[name])] = delta(factors)
    return full


parts = st.dictionaries(
    st.sampled_from(list(ROWS)),
    st.tuples(st.integers(1, 4), st.integers(0, 2**20), st.sampled_from([0.5, 1.0, 2.0])),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(parts)
def test_fusing_is_exact_and_the_rank_is_the_sum(drawn):
    modules = {name: part(name, *args) for name, args in drawn.items()}
    other = LoRAFactors(a=matrix(1, 5), b=matrix(3, 1))
    result = fuse(modules | {"l.o": other}, FUSED)
    assert set(result) == {"l.qkv", "l.o"}
    assert result["l.o"] is other
    np.testing.assert_array_equal(delta(result["l.qkv"]), dense(modules))
    same_a = len({factors.a.tobytes() for factors in modules.values()}) == 1
    assert result["l.qkv"].rank == sum(f.rank for f in modules.values()) or same_a


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 4), seed=st.integers(0, 2**20), scale=st.sampled_from([0.5, 3.0]))
def test_splitting_and_fusing_is_the_identity(rank, seed, scale):
    rng = np.random.default_rng(seed)
    whole = LoRAFactors(a=rng.normal(size=(rank, 5)), b=rng.normal(size=(8, rank)), scale=scale)
    split = split_fused(Adapter({"l.qkv": whole}), FUSED)
    assert set(split.modules) == set(ROWS)
    # The matrix library may sum a product of fewer rows in another order.
    np.testing.assert_allclose(dense(split.modules), delta(whole), rtol=0, atol=1e-13)
    back = fuse(split.modules, FUSED)["l.qkv"]
    np.testing.assert_array_equal(back.a, whole.a)
    np.testing.assert_array_equal(back.b, whole.b)
    assert back.scale == scale


def test_a_shared_a_with_a_part_missing_keeps_the_rank():
    split = split_fused(Adapter({"l.qkv": LoRAFactors(a=matrix(2, 5), b=matrix(8, 2))}), FUSED).modules
    del split["l.k"]
    fused = fuse(split, FUSED)["l.qkv"]
    assert fused.rank == 2
    np.testing.assert_array_equal(fused.b[4:6], 0)


def test_different_scales_are_folded_into_b():
    modules = {"l.q": part("l.q", 2, 0, scale=0.5), "l.v": part("l.v", 1, 1, scale=4.0)}
    fused = fuse(modules, FUSED)["l.qkv"]
    assert fused.scale == 1.0
    np.testing.assert_array_equal(delta(fused), dense(modules))


def test_half_precision_parts_are_widened_before_a_scale_rounds_them():
    half = {
        name: LoRAFactors(a=matrix(2, 5).astype(np.float16), b=matrix(2, 2, seed=3).astype(np.float16), scale=scale)
        for name, scale in (("l.k", 1 / 3), ("l.v", 1.0))
    }
    fused = fuse(half, FUSED)["l.qkv"]
    assert fused.b.dtype == np.float32
    np.testing.assert_allclose(delta(fused), dense(half), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "modules",
    [
        {"l.q": LoRAFactors(a=matrix(1, 5), b=matrix(3, 1))},
        {"l.q": part("l.q", 1, 0), "l.v": LoRAFactors(a=matrix(1, 6), b=matrix(2, 1))},
    ],
    ids=["rows", "width"],
)
def test_parts_of_another_base_are_refused(modules):
    with pytest.raises(AdapterError, match="another base"):
        fuse(modules, FUSED)


def test_a_fused_update_of_another_base_is_refused():
    with pytest.raises(AdapterError, match="9 rows"):
        split_fused(Adapter({"l.qkv": LoRAFactors(a=matrix(1, 5), b=matrix(9, 1))}), FUSED)
    both = {"l.q": part("l.q", 1, 0), "l.qkv": LoRAFactors(a=matrix(1, 5), b=matrix(8, 1))}
    with pytest.raises(AdapterError, match="has two updates"):
        split_fused(Adapter(both), FUSED)


def test_writing_with_a_layout_writes_the_fused_modules(tmp_path):
    modules = {"l.q": part("l.q", 2, 0), "l.v": part("l.v", 1, 1)}
    base = base_of(["l.q", "l.k", "m.q"], fused=FUSED | {"m.qkv": (("m.q", 0, 8),)})
    out = save_adapter(Adapter(modules), tmp_path / "o", base=base)
    back = load_adapter(out)
    assert list(back.modules) == ["l.qkv"]
    np.testing.assert_array_equal(delta(back.modules["l.qkv"]), dense(modules))
    assert '"m.qkv"' in (out / "adapter_config.json").read_text()
