"""One contract for every kind of adapter: what peft makes of the file on its base is what our factors make of it."""

import json

import numpy as np
import pytest
import safetensors.numpy
from adapter_folders import delta
from tiny_models import tiny_model, torch

from jcrosslora.adapter import load_adapter
from jcrosslora.adapter.kinds.registry import KINDS
from jcrosslora.checkpoint import open_base

peft = pytest.importorskip("peft")
# peft warns of many settings that are meant here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 6}
FULL = 48  # the short side of every module: nothing is cut


def lora(**settings):
    return peft.LoraConfig(**(LORA | {"target_modules": TARGETS} | settings))


def adalora(**settings):
    config = peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, lora_alpha=5, target_modules=TARGETS, **settings)
    config.rank_pattern = {
        f"model.layers.{layer}.{path}.lora_E": [layer != 1 and rank != 2 for rank in range(6)]
        for layer in range(3)
        for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    return config


# Kind -> label to the configuration of an adapter that peft makes.
MADE = {
    "LoRA": {
        "plain": lambda: lora(),
        "rslora": lambda: lora(use_rslora=True),
        "gaussian": lambda: lora(init_lora_weights="gaussian"),
        "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
        "eva": lambda: lora(init_lora_weights="eva"),
        "patterns": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 9}),
    },
    "DoRA": {
        "plain": lambda: lora(use_dora=True),
        "rslora": lambda: lora(use_dora=True, use_rslora=True),
        "of PiSSA": lambda: lora(use_dora=True, init_lora_weights="pissa"),
    },
    "PiSSA": {
        "plain": lambda: lora(init_lora_weights="pissa"),
        "patterns": lambda: lora(init_lora_weights="pissa", rank_pattern={"q_proj": 2}, use_rslora=True),
    },
    "OLoRA": {
        "plain": lambda: lora(init_lora_weights="olora"),
        "patterns": lambda: lora(init_lora_weights="olora", rank_pattern={"q_proj": 2}, use_rslora=True),
    },
    "AdaLoRA": {"pruned": adalora},
    "VeRA": {
        "saved": lambda: peft.VeraConfig(r=5, target_modules=TARGETS),
        "drawn anew": lambda: peft.VeraConfig(
            r=5, target_modules=TARGETS, save_projection=False, projection_prng_key=2**33 + 7
        ),
    },
    "VB-LoRA": {
        "logits": lambda: peft.VBLoRAConfig(r=4, num_vectors=20, vector_length=8, topk=3, target_modules=TARGETS),
        "top alone": lambda: peft.VBLoRAConfig(
            r=4, num_vectors=20, vector_length=8, topk=3, target_modules=TARGETS, save_only_topk_weights=True
        ),
    },
    "LoHa": {
        "low rank": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
        "full rank": lambda: peft.LoHaConfig(r=8, alpha=5, target_modules=TARGETS),
        "patterns": lambda: peft.LoHaConfig(
            r=3, alpha=5, target_modules=TARGETS, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 7}
        ),
    },
    "LoKr": {
        "whole": lambda: peft.LoKrConfig(r=8, alpha=5, target_modules=TARGETS),
        "factors": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=TARGETS, decompose_both=True),
        "one factor": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=TARGETS, decompose_factor=2),
    },
    "Uni-LoRA": {
        "replayed": lambda: peft.UniLoraConfig(r=3, theta_d_length=77, proj_seed=5, target_modules=TARGETS),
        "stored": lambda: peft.UniLoraConfig(r=3, theta_d_length=77, target_modules=TARGETS, save_indices=True),
        "layers": lambda: peft.UniLoraConfig(
            r=2, theta_d_length=5000, target_modules=["o_proj", "up_proj", "lm_head"], layers_to_transform=[0, 2]
        ),
        "regex": lambda: peft.UniLoraConfig(r=2, theta_d_length=50, target_modules=r".*\.[12]\..*\.(k|gate)_proj"),
    },
    "aLoRA": {"plain": lambda: lora(alora_invocation_tokens=[5, 7], task_type="CAUSAL_LM")},
}
CASES = [pytest.param(kind, make, id=f"{kind} {label}") for kind, cases in MADE.items() for label, make in cases.items()]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


def make_adapter(config, folder):
    """An adapter file with random numbers in all that is trained."""
    wrapped = peft.get_peft_model(tiny_model("llama"), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)


def merged_weights(folder):
    """The weights of the base with the adapter, and of the base alone, as peft loads it."""
    model = tiny_model("llama")
    base = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    return wrapped.merge_and_unload().state_dict(), base


def check_against(modules, merged, base, atol=1e-4):
    changed = {name.removesuffix(".weight") for name in base if not np.array_equal(base[name], merged[name])}
    assert changed - {"lm_head", "model.embed_tokens"} == set(modules)
    for name, factors in modules.items():
        got = base[f"{name}.weight"].astype(np.float64) + delta(factors)
        np.testing.assert_allclose(got, merged[f"{name}.weight"], rtol=0, atol=atol)


@pytest.mark.parametrize(("kind", "make"), CASES)
def test_factors_are_the_update_that_peft_makes_of_the_file(tmp_path, base_folder, kind, make):
    make_adapter(make(), tmp_path)
    adapter = load_adapter(tmp_path, open_base(base_folder), rank=FULL)
    assert adapter.info.kind == kind
    if kind == "LoRA":
        assert adapter.info.read_as is None
    else:
        assert adapter.info.read_as is not None
        assert "exactly" in adapter.info.read_as
        assert adapter.info.read_as.startswith(f"{kind} (")
    if kind == "aLoRA":  # peft does not merge it: as a plain one it is the same weights
        config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"alora_invocation_tokens": None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert adapter.info.invocation == (5, 7)
    merged, base = merged_weights(tmp_path)
    check_against(adapter.modules, {name: value.numpy() for name, value in merged.items()}, base)
