"""Adapters of every kind that peft can make, for a tiny llama base."""

import pytest
from tiny_models import tiny_model, torch

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 6}
FULL = 48  # the short side of every module: nothing is truncated


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
        "mica": lambda: lora(init_lora_weights="mica"),
        "patterns": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 9}),
    },
    "DoRA": {
        "plain": lambda: lora(use_dora=True),
        "rslora": lambda: lora(use_dora=True, use_rslora=True),
        "of PiSSA": lambda: lora(use_dora=True, init_lora_weights="pissa", target_modules=["q_proj"]),
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
        "drawn with the head": lambda: peft.VeraConfig(
            r=3, target_modules=["q_proj", "lm_head"], save_projection=False
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


def random_peft(config, model=None):
    """A tiny model of peft, of llama if none is given, with random numbers in all trained parameters."""
    wrapped = peft.get_peft_model(tiny_model("llama") if model is None else model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped


def make_adapter(config, folder, model=None):
    """Save the adapter of `random_peft`."""
    random_peft(config, model).save_pretrained(folder)
