"""LoRA of MaxText, against the logits that MaxText computed; `maxtext_models.py` writes the fixtures."""

import json
import shutil

import numpy as np
import pytest
from command_line import main
from decoder_pairs import run
from maxtext_models import ALPHA, FIXTURES, MODELS, RANK, TOKENS
from tiny_bases import delta

import jcrosslora as jcl
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.errors import AdapterError

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
Q = "model.layers.0.self_attn.q_proj"


def arrays(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / name / "lora.npz"))


def base_of(name: str):
    return jcl.open_base(FIXTURES / name / "base")


@pytest.mark.parametrize("name", MODELS)
def test_a_lora_of_maxtext_predicts_as_maxtext_does(name):
    folder, base = FIXTURES / name, base_of(name)
    decoder = load_model(base)
    base_logits, want = np.load(folder / "base_logits.npy"), np.load(folder / "logits.npy")
    np.testing.assert_allclose(run(decoder, TOKENS), base_logits, **TOLERANCE)
    if name == "llama":
        adapter = jcl.load_adapter(folder / "run", base)  # its metadata holds the alpha
    else:
        adapter = jcl.load_adapter(arrays(name), base, alpha=ALPHA)
    assert adapter.modules.keys() == base.modules.keys()
    assert {item.rank for item in adapter.modules.values()} == {RANK}
    np.testing.assert_allclose(run(decoder, TOKENS, adapter=stack_adapter(adapter, base)), want, **TOLERANCE)
    assert np.abs(base_logits - want).max() > 0.1


@pytest.mark.parametrize(("name", "number"), [("qwen3", "layers_{}"), ("gemma2", "layers.{}")])
def test_numbered_layers_are_those_of_the_stack(name, number):
    base, numbered = base_of(name), {}
    for key, array in arrays(name).items():
        for layer in range(array.shape[1]):
            numbered[f"params.{key.replace('layers', number.format(layer))}"] = array[:, layer]
    want = jcl.load_adapter(arrays(name), base, alpha=ALPHA)
    found = jcl.load_adapter(numbered, base, alpha=ALPHA)
    for module, factors in want.modules.items():
        np.testing.assert_array_equal(delta(found.modules[module]), delta(factors))


def test_the_positions_may_be_stated(tmp_path):
    folder = shutil.copytree(FIXTURES / "llama" / "run", tmp_path / "run")
    base, found = base_of("llama"), []
    for kind in ("llama3.1", "default"):
        (folder / "lora_config.json").write_text(json.dumps({"alpha": ALPHA, "rope_type": kind}))
        found.append(jcl.load_adapter(folder, base).modules[Q].b.reshape(2, 8, RANK))
    neighbours, halves = found
    np.testing.assert_array_equal(neighbours, np.concatenate([halves[:, ::2], halves[:, 1::2]], axis=1))


def test_export_writes_for_peft(tmp_path):
    main(
        [
            "export",
            str(FIXTURES / "llama" / "run"),
            "--base",
            str(FIXTURES / "llama" / "base"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    want = jcl.load_adapter(FIXTURES / "llama" / "run", base_of("llama")).modules[Q]
    np.testing.assert_allclose(delta(jcl.load_adapter(tmp_path / "out").modules[Q]), delta(want), rtol=1e-5, atol=1e-6)


def changed(name: str, was: str, new: str) -> dict[str, np.ndarray]:
    return {key.replace(was, new): array for key, array in arrays(name).items()}


@pytest.mark.parametrize(
    ("tree", "base", "message"),
    [
        (changed("qwen3", "", ""), None, "give the base that it was trained on"),
        (changed("qwen3", "query", "qkv_proj"), "qwen3", "self_attention.qkv_proj.kernel is not known for qwen3"),
        (changed("qwen3", "layers.mlp.wo", "logits_dense"), "qwen3", "decoder.logits_dense.kernel is not known"),
        (changed("gemma2", "_local", ""), "gemma2", "kernel is not known for gemma2"),
        (changed("mistral", "layers_1", "layers_2"), "mistral", "layers_2.mlp.wi_0.kernel is not known"),
        (changed("qwen3", "", ""), "llama", "expected 3 layers of the base along axis 1"),
        (
            changed("mistral", "self_attention.key", "mlp.wi_0"),
            "mistral",
            r"\[2, 8\], and that of the base.*give the base",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(tree, base, message):
    with pytest.raises(AdapterError, match=message):
        jcl.load_adapter(tree, base and base_of(base), alpha=ALPHA)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 16}, "two converters of MaxText scale the queries"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' MaxText orders the features"),
        ("mistral", {"model_type": "smollm3", "no_rope_layers": [1, 1]}, "the base is of smollm3"),
    ],
)
def test_a_base_that_leaves_the_layout_open_is_refused(name, changes, message, tmp_path):
    folder = shutil.copytree(FIXTURES / name / "base", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(AdapterError, match=message):
        jcl.load_adapter(arrays(name), jcl.open_base(folder), alpha=ALPHA)
