"""A base whose channels were rescaled, as AWQ and SmoothQuant do: the same model, and a copy follows the scales."""

import numpy as np
import pytest
from adapters_of_all import adapter_of_all
from full_set import full_except
from relatives import is_linear, make, merged, noisy, rescaled, role_of, then
from rescaled_bases import rescale
from rescaled_cases import CASES
from tiny_bases import random_adapter
from whole_passes import scores

import jcrosslora as jcl
from jcrosslora.adapter.difference import module_differences
from jcrosslora.architectures.blocks import DENSE_ROLES
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.relation import choose_method, compare_bases, find_channel_scales

IDS = np.random.default_rng(3).integers(0, 128, 40)
QUICK = ["llama", "qwen3_moe", "olmo2"]


def answers(base, adapter=None):
    model = load_model(base, np.float32)
    return scores(model, IDS, None if adapter is None else stack_adapter(adapter, base))


def written(tmp_path, change, family="llama", **dims):
    made = make(family, **dims)
    return made.write(tmp_path / "source"), change(made).write(tmp_path / "target")


def of_case(name, change, tmp_path):
    """Write a base and its changed copy."""
    family, settings = CASES[name]
    made = make(family, **settings)
    return made.write(tmp_path / "plain"), change(made).write(tmp_path / "rescaled")


def effect_lost(source, target, adapter, moved):
    """Return by how much the effect of a moved adapter differs from that on the source, over this."""
    wanted, found = (answers(base, one) - answers(base) for base, one in ((source, adapter), (target, moved)))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


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


def gains_trained(made):
    """Change all gains by a few percent, as training does."""
    rng = np.random.default_rng(4)
    return made.change(lambda name, x: np.exp(0.05 * rng.normal(size=x.shape)) * x if "norm" in name else x)


@pytest.mark.parametrize("name", full_except(CASES, QUICK))
@pytest.mark.parametrize("change", [then(noisy(0.1), gains_trained), merged(2, 0.3, roles=DENSE_ROLES)])
def test_a_trained_base_of_any_family_is_not_taken_for_rescaled(tmp_path, name, change):
    source, target = of_case(name, change, tmp_path)
    assert find_channel_scales(source, target) is None
    assert compare_bases(source, target).choice.method == "interpolated-copy"


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


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", full_except(CASES, QUICK))
def test_an_adapter_computes_the_same_on_a_rescaled_base(tmp_path, name, reverse):
    bases = of_case(name, lambda made: rescale(made, 0.5), tmp_path)
    np.testing.assert_allclose(answers(bases[1]), answers(bases[0]), atol=1e-3)
    source, target = bases[::-1] if reverse else bases
    adapter = adapter_of_all(source)
    result = jcl.transfer(adapter, source, target, "auto", cache=False)
    assert result.report.recipe.method == "copy"
    assert effect_lost(source, target, adapter, result.adapter) < 2e-3
    assert effect_lost(source, target, adapter, adapter) > 0.3
    assert "channels rescaled" in (words := compare_bases(source, target).words)
    assert set(words) <= {"channels rescaled", "rounded"}


@pytest.mark.parametrize("name", full_except(CASES, QUICK))
@pytest.mark.parametrize("signs", [False, pytest.param(True, marks=pytest.mark.full)])
def test_scales_between_modules_alone_are_followed(tmp_path, name, signs):
    """Of all that a norm may have, none is: the rows of one module show the scales of the columns of the next."""
    source, target = of_case(name, lambda made: rescale(made, 0.5, norms=False, signs=signs), tmp_path)
    adapter = adapter_of_all(source)
    moved = jcl.transfer(adapter, source, target, "auto", cache=False).adapter
    assert effect_lost(source, target, adapter, moved) < 2e-3
    assert effect_lost(source, target, adapter, adapter) > 0.1


def updates(adapter):
    """Return all numbers of dW of an adapter, one after another."""
    modules = [one.scale * np.asarray(one.b) @ np.asarray(one.a) for one in adapter.modules.values()]
    return np.concatenate([one.ravel() for one in (*modules, *(each.b @ each.a for each in adapter.experts))])


@pytest.mark.parametrize("name", full_except(CASES, QUICK))
def test_an_update_is_nearly_the_same_where_the_rescaled_base_is_rounded(tmp_path, name):
    source, exact = of_case(name, lambda made: rescale(made, 0.5), tmp_path)
    rounded = of_case(name, lambda made: rescale(made, 0.5).quantised("Q4_0"), tmp_path / "rounded")[1]
    adapter = adapter_of_all(source)
    found = (jcl.transfer(adapter, source, one, "copy", cache=False).adapter for one in (exact, rounded))
    wanted, moved = map(updates, found)
    lost = [np.linalg.norm(one - wanted) / np.linalg.norm(wanted) for one in (moved, updates(adapter))]
    assert lost[0] < 0.1
    assert lost[1] > 0.4
    assert "channels rescaled" in compare_bases(source, rounded).words


@pytest.mark.parametrize("families", [("llama", "olmo2"), ("olmo2", "llama")])
def test_families_with_other_norms_have_no_scales(tmp_path, families):
    bases = [make(family).write(tmp_path / family) for family in families]
    assert find_channel_scales(*bases) is None


@pytest.mark.parametrize("rounded", [False, True])
def test_one_rescaled_layer_of_six_is_found(tmp_path, rounded):
    made = make(num_hidden_layers=6)
    changed = rescale(made, 0.5, layers=[3])
    changed = changed.quantised("Q4_0") if rounded else changed
    source, target = made.write(tmp_path / "source"), changed.write(tmp_path / "target")
    scales = find_channel_scales(source, target)
    assert scales is not None
    assert {name.split(".")[2] for name in (*scales.rows, *scales.columns)} == {"3"}
    words = compare_bases(source, target).words
    assert "channels rescaled" in words
    assert not {"LoRA-merged", "further trained"} & set(words)


def odd_gains(made):
    """Change the gains of norms as AWQ does, and the weights in no way that belongs to it."""
    rng = np.random.default_rng(5)
    gains = lambda name, x: x * np.exp(0.3 * rng.normal(size=x.shape)) if name.endswith("layernorm.weight") else x  # noqa: E731
    return noisy(0.1, only=is_linear)(made.change(lambda name, x: gains(name, x).astype(np.float32)))


def test_gains_that_the_weights_do_not_explain_are_named(tmp_path):
    bases = written(tmp_path, odd_gains)
    assert find_channel_scales(*bases) is None
    compared, report = compare_bases(*bases), jcl.transfer(random_adapter(bases[0]), *bases, "auto", cache=False).report
    for text in (*compared.notes, compared.choice.reason, *report.warnings):
        assert "gains of norms differ as if channels had been rescaled" in text
    assert compared.choice.method == report.recipe.method == "copy"
    assert len(report.warnings) == 1
    trained = written(tmp_path / "trained", noisy(0.1, only=is_linear))
    assert compare_bases(*trained).choice.method == "interpolated-copy"


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
