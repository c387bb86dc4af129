"""Kinds of adapter that are refused: what the message tells the user to do works in peft."""

import re

import numpy as np
import pytest
from adapter_folders import delta
from kind_cases import peft
from tiny_models import tiny_model, torch

from jcrosslora.adapter import load_adapter
from jcrosslora.adapter.config import KNOWN_TYPES, why_refused
from jcrosslora.adapter.kinds import TYPES
from jcrosslora.errors import AdapterError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
ON = {"target_modules": ["q_proj", "o_proj"]}
RANK = 48  # full

# peft type -> settings that fit a tiny llama.
MADE = {
    "C3A": {"block_size": 12},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 40},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4},
    "TINYLORA": {},
    "WAVEFT": {"n_frequency": 40},
    "ADAMSS": {},
    "BOFT": {"boft_block_size": 4},
    "DEFT": {},
    "FROD": {},
    "GLORA": {},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": 0, "oft_block_size": 4},
    "OSF": {},
    "PEANUT": {},
    "PVERA": {},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {},
}
# Types without a change of weight matrices, or with one that depends on the input.
NO_MATRICES = {
    *("ADAPTION_PROMPT", "BEFT", "CARTRIDGE", "CPT", "LILY", "LN_TUNING", "MULTITASK_PROMPT_TUNING", "POLY"),
    *("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "SHADOW", "TRAINABLE_TOKENS", "XLORA"),
}


def configuration(peft_type, **settings):
    found = {str(getattr(name, "value", name)): kind for name, kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type not in found:
        pytest.skip(f"this peft has no {peft_type}")
    try:
        return found[peft_type](**settings, **ON)
    except ImportError as error:  # AdaMSS needs scikit-learn
        pytest.skip(str(error))


def trained(config):
    """Wrap a tiny llama of one layer, with random numbers in all trained parameters."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(tiny_model("llama", num_hidden_layers=1), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return wrapped.eval()


def change(merged) -> dict[str, np.ndarray]:
    """Return the differences of the q and o matrices from those of the base."""
    base = tiny_model("llama", num_hidden_layers=1).state_dict()
    return {
        name.removesuffix(".weight"): (value - base[name]).numpy()
        for name, value in merged.state_dict().items()
        if name.endswith(("q_proj.weight", "o_proj.weight"))
    }


def test_every_type_of_peft_is_read_or_tried_here():
    assert not MADE.keys() & (TYPES | NO_MATRICES)
    assert MADE.keys() | TYPES | NO_MATRICES == KNOWN_TYPES
    for name in NO_MATRICES:
        assert "train a plain LoRA" in why_refused(name)
        assert "merge" not in why_refused(name)


@pytest.mark.parametrize("peft_type", MADE)
def test_the_advice_works_in_peft(tmp_path, peft_type):
    wrapped = trained(configuration(peft_type, **MADE[peft_type]))
    wrapped.save_pretrained(tmp_path / "own")
    with pytest.raises(AdapterError, match=peft_type) as refused:
        load_adapter(tmp_path / "own")
    if "save_as_lora" in str(refused.value):
        peft.save_as_lora(tmp_path / "lora", wrapped, RANK)
        found = {name: delta(factors) for name, factors in load_adapter(tmp_path / "lora").modules.items()}
        wanted = change(wrapped.merge_and_unload())
        assert found.keys() == wanted.keys()
        for name, update in wanted.items():
            assert np.abs(update).max() > 1e-4
            np.testing.assert_allclose(found[name], update, atol=2e-5)
    else:
        assert re.search(r"no conversion.*merge_and_unload\(\)", str(refused.value))
        with pytest.raises(TypeError, match="support"):
            peft.convert_to_lora(wrapped, RANK)
        tokens = torch.tensor([[5, 9, 30, 7]])
        with torch.no_grad():
            wanted = wrapped(tokens).logits
            torch.testing.assert_close(wrapped.merge_and_unload()(tokens).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_block_diagonal_lora_is_not_converted_by_peft(tmp_path):
    blocks = peft.tuners.lora.config.BdLoraConfig(
        target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2
    )
    wrapped = trained(peft.LoraConfig(r=4, use_bdlora=blocks, **ON))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"BD-LoRA.*merge_and_unload\(\)"):
        load_adapter(tmp_path)
    with pytest.raises(RuntimeError, match="shapes"):
        peft.convert_to_lora(wrapped, 4)


def test_pissa_of_a_random_svd_is_read_from_what_peft_converts(tmp_path):
    """The random SVD that was trained on is nowhere stored; peft itself loads such a file onto another base."""
    torch.manual_seed(1)
    base = tiny_model("llama", num_hidden_layers=1)
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa_niter_1", **ON))
    config = wrapped.peft_config["default"]
    config.init_lora_weights = True  # as peft asks for of the adapter before training
    wrapped.save_pretrained(tmp_path / "start")
    config.init_lora_weights = "pissa_niter_1"
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "own")
    with pytest.raises(AdapterError, match=r"pissa_niter_N.*path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "own")
    wrapped.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    wanted = change(wrapped.merge_and_unload())
    for name, factors in load_adapter(tmp_path / "lora").modules.items():
        np.testing.assert_allclose(delta(factors), wanted[name], atol=1e-5)
    fresh = tiny_model("llama", num_hidden_layers=1)
    torch.manual_seed(3)
    again = change(peft.PeftModel.from_pretrained(fresh, tmp_path / "own").merge_and_unload())
    assert all(np.abs(again[name] - update).max() > 1e-2 for name, update in wanted.items())
