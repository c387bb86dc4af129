"""LoRA of google-deepmind/gemma, against the logits that it computed; `gemma_models.py` writes the fixtures."""

import numpy as np
import pytest
from decoder_pairs import run
from gemma_models import FIXTURES, MODELS, RANK, TOKENS

import jcrosslora as jcl
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.errors import AdapterError

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def given(name: str):
    """The LoRA as the library's trainer saved it, as `save_params` did, or as arrays by name."""
    folder = FIXTURES / name
    if name == "gemma2-keys":
        return dict(np.load(folder / "lora.npz"))
    return folder / "run" / "checkpoints" if name == "gemma2" else folder / "lora"


@pytest.mark.parametrize("name", MODELS)
def test_a_lora_of_google_deepmind_gemma_predicts_as_the_library_does(name):
    folder, base = FIXTURES / name, jcl.open_base(FIXTURES / name / "base")
    base_logits, want = np.load(folder / "base_logits.npy"), np.load(folder / "logits.npy")
    decoder = load_model(base)
    np.testing.assert_allclose(run(decoder, TOKENS), base_logits, **TOLERANCE)
    adapter = jcl.load_adapter(given(name), base)
    assert adapter.modules.keys() == base.modules.keys()
    assert {item.rank for item in adapter.modules.values()} == {RANK}
    np.testing.assert_allclose(run(decoder, TOKENS, adapter=stack_adapter(adapter, base)), want, **TOLERANCE)
    assert np.abs(base_logits - want).max() > 0.1


def test_lora_of_a_vision_tower_is_left_out_if_no_image_trained_it():
    """Gemma 3 4B and larger have it unless the model is made with text_only=True."""
    tree, name = given("gemma2-keys"), "embedder.mm_input_projection._LoRAEinsum_0.lora"
    vision = {f"{name}.a": np.ones((6, RANK)), f"{name}.b": np.zeros((RANK, 16))}
    want, found = jcl.load_adapter(tree), jcl.load_adapter(tree | vision)
    assert found.modules.keys() == want.modules.keys()
    for unknown in (vision, tree | vision | {f"{name}.b": np.ones((RANK, 16))}):
        with pytest.raises(AdapterError, match=r"mm_input_projection.* is not known"):
            jcl.load_adapter(unknown)
