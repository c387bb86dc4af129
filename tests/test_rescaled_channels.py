"""A base whose channels were rescaled, as AWQ and SmoothQuant do: the same model, and a copy follows the scales."""

import numpy as np
import pytest
from relatives import is_linear, make, noisy, rescaled, role_of, then
from tiny_bases import random_adapter
from whole_passes import scores

import jcrosslora as jcl
from jcrosslora.adapter.difference import module_differences
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.relation import choose_method, compare_bases, find_channel_scales

IDS = np.random.default_rng(3).integers(0, 128, 40)


def answers(base, adapter=None):
    model = load_model(base, np.float32)
    return scores(model, IDS, None if adapter is None else stack_adapter(adapter, base))


def written(tmp_path, change, family="llama", **dims):
    made = make(family, **dims)
    return made.write(tmp_path / "source"), change(made).write(tmp_path / "target")


def move(bases, method):
    """Move a random adapter of the source; return it, and what the target has then."""
    adapter = random_adapter(bases[0], scale=0.05)
    return adapter, jcl.transfer(adapter, *bases, method, cache=False).adapter


def rows_scaled(made):
    """Scale the rows of every module, which nothing takes back."""
    rng = np.random.default_rng(4)
    return made.change(lambda name, x: np.exp(0.3 * rng.normal(size=(len(x), 1))) * x if is_linear(name) else x)


def rows_zeroed(made):
    rng = np.random.default_rng(4)
    return made.change(lambda name, x: (rng.random((len(x), 1)) > 0.3) * x if is_linear(name) else x)


@pytest.mark.parametrize(
    ("family", "dims"),
    [("llama", {}), ("llama", {"num_key_value_heads": 4}), ("gemma2", {}), ("qwen2", {})],
)
@pytest.mark.parametrize("method", ["copy", "auto"])
def test_a_copy_computes_what_the_source_does(tmp_path, family, dims, method):
    source, target = bases = written(tmp_path, rescaled(0.5), family, **dims)
    adapter, moved = move(bases, method)
    base, wanted = answers(source), answers(source, adapter)
    np.testing.assert_allclose(answers(target), base, atol=1e-3)
    np.testing.assert_allclose(answers(target, moved), wanted, atol=1e-3)
    unchanged = np.abs(answers(target, adapter) - wanted).max()
    assert unchanged > 0.1 * np.abs(wanted - base).max()  # so the scales matter


@pytest.mark.parametrize(
    "change", [lambda made: made, lambda made: made.rounded("BF16"), noisy(0.1), noisy(3.0), rows_scaled, rows_zeroed]
)
def test_a_copy_of_other_bases_is_the_update_bit_by_bit(tmp_path, change):
    bases = written(tmp_path, change)
    assert find_channel_scales(*bases) is None
    adapter, moved = move(bases, "copy")
    for name, factors in adapter.modules.items():
        np.testing.assert_array_equal(moved.modules[name].a, factors.a)
        np.testing.assert_array_equal(moved.modules[name].b, np.float32(factors.scale) * factors.b)


def test_scales_that_nothing_takes_back_are_not_followed(tmp_path):
    """Here only the columns behind norms and their gains agree; those of down_proj do not with up_proj."""

    def change(made):
        found = rescaled(0.5)(made).tensors
        kept = {
            name: x for name, x in made.tensors.items() if "layers" in name and role_of(name) in ("down_proj", "o_proj")
        }
        return type(made)(made.config, found | kept)

    scales = find_channel_scales(*written(tmp_path, change))
    assert {name.rsplit(".")[-1] for name in scales.columns} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert not scales.rows


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_scales_are_found_under_rounding_of_either_side(tmp_path, spread, kind, side):
    made = make()
    pair = (made, rescaled(spread)(made).quantised(kind))
    source, target = (
        one.write(tmp_path / name) for one, name in zip(pair if side == "target" else pair[::-1], "st", strict=True)
    )
    found, exact = (
        find_channel_scales(source, target),
        find_channel_scales(
            *(
                one.write(tmp_path / f"exact {name}")
                for one, name in zip((made, rescaled(spread)(made)), "st", strict=True)
            )
        ),
    )
    for kinds in ("rows", "columns"):
        for name, scales in getattr(exact, kinds).items():
            wanted = scales if side == "target" else 1 / scales
            errors = np.abs(np.log(getattr(found, kinds)[name] / wanted))
            assert np.quantile(errors, 0.9) < 0.2


def test_a_rounded_source_is_compensated_as_without_scales(tmp_path, monkeypatch):
    monkeypatch.setattr("jcrosslora.relation.method_selection.why_not_run", lambda *_: None)  # no tokenizers here
    made = make()
    source = rescaled(0.5)(made).quantised("Q4_0").write_gguf(tmp_path / "source.gguf", "Q4_0")
    assert choose_method(source, made.write(tmp_path / "target")).method == "compensated-copy"


def test_bases_with_experts_are_compared_as_they_are(tmp_path):
    """Scales of attention, which are found in a dense base, are not: those of experts could not be followed."""

    def change(made):
        factors = np.linspace(0.5, 2, made.size("hidden_size"))
        ways = {"input_layernorm": 1 / factors, **dict.fromkeys(("q_proj", "k_proj", "v_proj"), factors)}
        return made.change(
            lambda name, x: (x * ways.get(role_of(name), 1)).astype(np.float32) if "layers" in name else x
        )

    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    assert find_channel_scales(*written(tmp_path / "dense", change)) is not None
    bases = written(tmp_path / "experts", change, "qwen3_moe", **moe)
    assert find_channel_scales(*bases) is None
    assert "channels rescaled" not in compare_bases(*bases).words


def test_the_difference_that_is_added_is_that_of_the_rescaled_source(tmp_path):
    """With the whole difference the weights are the source's with its adapter, up to the scales that noise hides."""
    bases = written(tmp_path, then(rescaled(0.5), noisy(0.05, only=is_linear)))
    adapter, moved = move(bases, jcl.methods.make_method("interpolated-copy", {"interpolation": 1.0, "svd_rank": 64}))
    wanted = answers(bases[0], adapter)
    errors = [np.linalg.norm(answers(bases[1], one) - wanted) for one in (moved, move(bases, "copy")[1])]
    assert errors[0] < 0.3 * errors[1]


def test_inputs_get_the_scales_too(tmp_path):
    """D X' is the same, whether D and X are those of the source or those of its rescaled copy."""
    made = make()
    changed = noisy(0.1, only=is_linear)(made)
    plain = made.write(tmp_path / "plain"), changed.write(tmp_path / "noisy")
    bases = plain[0], rescaled(0.5)(changed).write(tmp_path / "rescaled")
    exact = find_channel_scales(plain[1], bases[1])
    shapes = {name: one.shape for name, one in bases[1].modules.items()}
    inputs = {
        name: np.random.default_rng(5).normal(size=(96, shape[1])).astype(np.float32) for name, shape in shapes.items()
    }
    scales = lambda name: exact.of(name, shapes[name])  # noqa: E731
    ways = (plain, None), (bases, scales)
    found = [dict(module_differences(*one, shapes, lambda _: 8, inputs.__getitem__, scales=own)) for one, own in ways]
    for name, first in found[0].items():
        rows, columns = exact.of(name, shapes[name])
        if np.all(rows == 1):  # otherwise the leading directions of the outputs are others
            product = rows[:, None] * (first.factors.b @ first.factors.a) * columns
            second = found[1][name].factors
            np.testing.assert_allclose(second.b @ second.a, product, atol=1e-3 * np.abs(product).max())
