"""Test which method `auto` selects for copies, related bases, unrelated bases, and bases that cannot be run."""

import dataclasses
import json

import numpy as np
import pytest
from ml_dtypes import bfloat16
from recording import recorded
from relatives import make, noisy, rescaled, then
from safetensors.numpy import save_file
from tiny_bases import llama_tensors, write_llama

from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.errors import CheckpointError
from jcrosslora.methods import METHODS
from jcrosslora.relation import (
    MethodChoice,
    PairFinding,
    PairKind,
    WeightSimilarity,
    choice_reason,
    choose_method,
    compare_bases,
    compare_weights,
    finding_phrase,
    method_selection,
    why_not_run,
    without_fit,
)
from jcrosslora.relation.method_selection import (
    ACTIVATION_METHOD,
    COPY_METHOD,
    FITTED_VARIANT,
    TRAINED_METHOD,
    WEIGHT_METHOD,
)


def write(folder, **options):
    """Write a tiny base with a tokenizer that the tokenizers library accepts."""
    write_llama(folder, **options)
    path = folder / "tokenizer.json"
    if path.exists():
        content = json.loads(path.read_text())
        for part in ("pre_tokenizer", "decoder"):
            content[part] |= {"add_prefix_space": False, "trim_offsets": True}
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_base(write(tmp_path_factory.mktemp("source")))


def changed(folder, change, only=".layers.") -> BaseModel:
    """Write the base of the fixture with every linear weight changed, or some by their names."""
    write(folder)
    save_file(
        {name: change(x) if x.ndim == 2 and only in name else x for name, x in llama_tensors().items()},
        folder / "model.safetensors",
    )
    return open_base(folder)


def levels(most: int):
    """Return a function that rounds blocks of 16 numbers to 2 * most + 1 levels: 7 for 4 bits, 15 for 5."""

    def rounded(x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(-1, 16)
        scale = np.abs(blocks).max(axis=1, keepdims=True) / most
        return (np.round(blocks / scale) * scale).reshape(x.shape)

    return rounded


def pruned(x: np.ndarray) -> np.ndarray:
    """Set the smaller half of the numbers to zero."""
    return np.where(np.abs(x) < np.median(np.abs(x)), np.float32(0), x)


def noise(size: float):
    """Return a function that adds independent noise, of a size relative to the weight's norm."""
    rng = np.random.default_rng(9)

    def add(x: np.ndarray) -> np.ndarray:
        return x + size * x.std() * rng.normal(size=x.shape).astype(np.float32)

    return add


def test_selected_methods_are_registered():
    assert {ACTIVATION_METHOD, WEIGHT_METHOD, COPY_METHOD, TRAINED_METHOD, *FITTED_VARIANT.values()} <= METHODS.keys()


def test_the_same_weights_select_copy_and_are_called_so(source, tmp_path):
    found = choose_method(source, changed(tmp_path, lambda x: x))
    assert found.method == "copy"
    assert found.reason.startswith("source and target are one and the same base (equal digests), and nothing has to")


@pytest.mark.parametrize("change", [lambda x: x.astype(np.float16), lambda x: x.astype(bfloat16), levels(15)])
def test_near_copy_selects_copy(source, tmp_path, change):
    found = choose_method(source, changed(tmp_path, change))
    assert found.method == "copy"
    assert "nearly identical (cosine " in found.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [(levels(7), "the target is rounded coarsely"), (levels(3), "rounded coarsely"), (pruned, "were set to zero")],
)
def test_compressed_target_selects_a_copy_that_is_fitted(source, tmp_path, change, reason):
    found = choose_method(source, changed(tmp_path, change))
    assert found.method == "distilled-copy"
    assert reason in found.reason
    assert "--method copy leaves out the fit" in found.reason


@pytest.mark.parametrize(("kind", "compressed"), [("Q8_0", False), ("Q5_1", False), ("Q4_0", True), ("Q4_1", True)])
def test_stored_quantisation_is_compressed_from_four_bits_down(tmp_path, kind, compressed):
    made = make()
    found = choose_method(made.write(tmp_path / "source", "BF16"), made.write_gguf(tmp_path / "target.gguf", kind))
    # Neither has a tokenizer, which matters only to a fit.
    assert found.method == "copy"
    assert ("what the compression costs remains" in found.reason) == compressed
    assert found.reason.endswith("so the update is copied") != compressed


@pytest.mark.parametrize(
    ("change", "kind", "method"),
    [
        (rescaled(0.5), None, "copy"),
        (rescaled(1.0), None, "copy"),
        (rescaled(0.5), "Q8_0", "copy"),
        (rescaled(0.15), "Q4_0", "distilled-copy"),
        (rescaled(0.5), "Q4_0", "distilled-copy"),
        (then(rescaled(0.5), noisy(0.05)), None, "interpolated-copy"),
    ],
)
def test_rescaled_channels_select_what_equal_ones_would(tmp_path, monkeypatch, change, kind, method):
    monkeypatch.setattr(method_selection, "why_not_run", lambda *_: None)  # no tokenizers here
    made = make()
    target = change(made) if kind is None else change(made).quantised(kind)
    found = choose_method(made.write(tmp_path / "source"), target.write(tmp_path / "target"))
    assert found.method == method
    assert "scales of channels" in found.reason


def test_compressed_source_selects_a_copy_with_its_error(source, tmp_path):
    """An adapter that was trained on four bits needs what these four bits changed."""
    found = choose_method(changed(tmp_path, levels(7)), source)
    assert found.method == "compensated-copy"
    assert "the source is rounded coarsely" in found.reason
    (tmp_path / "tokenizer.json").unlink()
    found = choose_method(open_base(tmp_path), source)
    assert found.method == "copy"
    assert "has no tokenizer.json" in found.reason


@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize(("first", "second"), [(7, 6), (6, 7)])
def test_two_compressed_bases_select_a_copy_that_is_fitted(tmp_path, first, second, stated):
    pair = [changed(tmp_path / str(most), levels(most)) for most in (first, second)]
    if stated:  # of the source alone, as where the target is a GGUF file
        path = tmp_path / str(first) / "config.json"
        settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        pair[0] = open_base(tmp_path / str(first))
    assert choose_method(*pair).method == "distilled-copy"


def test_a_target_of_which_only_the_mlp_is_sparse_selects_a_fit(source, tmp_path):
    target = changed(tmp_path, pruned, only=".mlp.")
    assert choose_method(source, target).method == "distilled-copy"
    assert compare_bases(source, target).words == ("sparse",)


def test_the_rounded_side_is_found_where_not_the_nearest_level_was_taken(source, tmp_path):
    """As by quantisers with an importance matrix, which nearest rounding does not explain."""
    rng = np.random.default_rng(3)

    def near(x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(-1, 16)
        scale = np.abs(blocks).max(axis=1, keepdims=True) / 7
        stray = rng.uniform(-0.3, 0.3, blocks.shape)
        return (np.clip(np.round(blocks / scale + stray), -7, 7) * scale).reshape(x.shape)

    other = changed(tmp_path, near)
    assert choose_method(other, source).method == "compensated-copy"
    assert choose_method(source, other).method == "distilled-copy"


@pytest.mark.parametrize("change", [levels(7), pruned])
def test_compressed_target_that_cannot_be_run_selects_copy(source, tmp_path, change):
    target = changed(tmp_path, change)
    (tmp_path / "tokenizer.json").unlink()
    found = choose_method(source, target)
    assert found.method == "copy"
    assert "has no tokenizer.json" in found.reason
    assert found.reason.endswith("what the compression costs remains")


@pytest.mark.parametrize("size", [0.05, 0.3, 0.5])
def test_near_copy_that_was_trained_selects_interpolated_copy(source, tmp_path, size):
    found = choose_method(source, changed(tmp_path, noise(size)))
    assert found.method == "interpolated-copy"
    assert "nearly identical (cosine " in found.reason
    assert "further trained" in found.reason


@pytest.mark.parametrize(
    ("size", "stated", "method"),
    [
        (0.05, (), "interpolated-copy"),
        (0.05, ("target",), "copy"),
        (0.3, ("target",), "distilled-copy"),
        (0.3, ("source",), "compensated-copy"),
    ],
)
def test_what_a_stated_quantiser_left_is_not_taken_for_training(tmp_path, size, stated, method):
    """Quantisers such as GPTQ do not round to the nearest level, which looks like training before the rounding."""
    pair = []
    for side, change in (("source", lambda x: x), ("target", lambda x: levels(127)(noise(size)(x)))):
        (tmp_path / side).mkdir()
        changed(tmp_path / side, change)
        path = tmp_path / side / "config.json"
        settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        path.write_text(json.dumps(json.loads(path.read_text()) | (settings if side in stated else {})))
        pair.append(open_base(tmp_path / side))
    assert {"further trained", "quantised"} <= set(compare_bases(*pair).words)
    found = choose_method(*pair)
    assert found.method == method
    assert ("its quantiser may have left what looks like further training" in found.reason) == bool(stated)


def test_every_finding_and_every_method_has_a_sentence():
    weights = WeightSimilarity(0.9, 0.1, 4)
    found = {finding_phrase(PairFinding(pair_kind, weights)) for pair_kind in PairKind}
    assert len(found) == len(PairKind)
    figures = "(cosine 0.900, relative distance 0.100 of the weights of 4 sampled modules)"
    assert sum(figures in one for one in found) == len(PairKind) - 1  # of the same base there is none to tell
    copies = ACTIVATION_METHOD, COPY_METHOD, TRAINED_METHOD, "compensated-copy", "select"
    for method in (*copies, *FITTED_VARIANT.values()):
        assert choice_reason("found", method).startswith("found, ")
    for method in (WEIGHT_METHOD, *FITTED_VARIANT):
        assert choice_reason("found", method, "but it is late").startswith("found, but it is late, so ")


@pytest.mark.parametrize("change", [noise(1.2), lambda x: 3 * x, lambda x: -x, lambda x: x[::-1].copy(), np.zeros_like])
def test_different_weights_select_distillation(source, tmp_path, change):
    found = choose_method(source, changed(tmp_path, change))
    assert found.method == ACTIVATION_METHOD
    assert "differ (cosine " in found.reason


def test_independent_weights_have_cosine_near_0(source, tmp_path):
    target = open_base(write(tmp_path, seed=1))
    similarity = compare_weights(source, target)
    assert similarity is not None
    assert abs(similarity.cosine) < 0.02
    assert similarity.distance == pytest.approx(2**0.5, rel=0.05)
    assert choose_method(source, target).method == ACTIVATION_METHOD


def test_weight_similarity_measures_the_added_noise(source, tmp_path):
    similarity = compare_weights(source, changed(tmp_path, noise(0.75)))
    assert similarity is not None
    assert similarity.distance == pytest.approx(0.75, abs=0.02)
    assert similarity.cosine == pytest.approx(0.8, abs=0.02)
    assert similarity.modules == 7 * 3


@pytest.mark.parametrize("dims", [{"hidden": 64}, {"layers": 2}, {"intermediate": 112}])
def test_different_shapes_select_distillation(source, tmp_path, dims):
    found = choose_method(source, open_base(write(tmp_path, seed=1, **dims)))
    assert found == MethodChoice(
        ACTIVATION_METHOD,
        "the modules of the two bases have different shapes, and both can be run on text, so an update is fitted to "
        "what they predict",
        "the modules of the two bases have different shapes",
    )


@pytest.mark.parametrize(
    ("change", "usual", "instead"),
    [
        (noise(1.2), "distill", "cross-lora"),
        (noise(0.3), "interpolated-copy", "interpolated-copy"),
        (lambda x: x, "copy", "copy"),
        (levels(7), "distilled-copy", "copy"),
        (pruned, "distilled-copy", "copy"),
    ],
)
def test_alora_falls_back_to_a_weight_only_method(source, tmp_path, change, usual, instead):
    choice = choose_method(source, changed(tmp_path, change))
    other = without_fit(choice, "it acts only after its invocation tokens")
    assert (choice.method, other.method) == (usual, instead)
    assert not METHODS[other.method]().fits_update
    assert other.reason.startswith(choice.found)
    assert ("invocation tokens" in other.reason) == (usual != instead)


@pytest.mark.parametrize("side", ["source", "target"])
def test_base_without_tokenizer_selects_a_weight_only_method(source, tmp_path, side):
    other = open_base(write(tmp_path, seed=1, tokenizer=False))
    found = choose_method(*((other, source) if side == "source" else (source, other)))
    assert found.method == WEIGHT_METHOD
    assert f"{tmp_path} has no tokenizer.json" in found.reason
    assert why_not_run(source, other) in found.reason
    assert why_not_run(source, source) is None
    assert "\n" not in found.reason


def test_base_that_the_decoder_refuses_selects_a_weight_only_method(source, tmp_path):
    write(tmp_path, seed=1)
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_act": "relu6"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = choose_method(source, open_base(tmp_path))
    assert found.method == WEIGHT_METHOD
    assert "relu6" in found.reason


def test_copy_needs_no_tokenizer(source, tmp_path):
    assert choose_method(source, open_base(write(tmp_path, tokenizer=False))).method == "copy"


def test_only_a_sample_of_rows_is_read(tmp_path):
    base, store = recorded(open_base(write(tmp_path, hidden=32, intermediate=400, layers=9)))
    assert compare_weights(base, base).modules == 4 * 7
    assert len(store.read) == len(store.row_counts) == 2 * 4 * 7  # no tensor as a whole
    assert max(store.row_counts) == 64


def test_module_in_a_fused_matrix_is_compared_by_its_own_rows(source, tmp_path):
    """The up projections of one base are the last rows of larger matrices of the other."""
    write(tmp_path, intermediate=160)
    taller = llama_tensors(intermediate=160)
    for name, x in llama_tensors().items():
        if name.endswith("up_proj.weight"):
            taller[name][80:] = x
    save_file(taller, tmp_path / "model.safetensors")
    other = open_base(tmp_path)
    modules = {
        name: dataclasses.replace(module, tensor=other.modules[name].tensor, rows=(80, 160))
        for name, module in source.modules.items()
        if module.role == "up_proj"
    }
    plain = {name: source.modules[name] for name in modules}
    pair = dataclasses.replace(source, modules=plain), dataclasses.replace(other, modules=modules)
    similarity = compare_weights(*pair)
    assert similarity is not None
    assert (similarity.cosine, similarity.distance, similarity.modules) == (pytest.approx(1), 0, 3)


def test_weight_with_nan_is_an_error(source, tmp_path):
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        choose_method(source, changed(tmp_path, lambda x: np.full_like(x, np.nan)))
