"""Tiny models of tunix with LoRA or quantisation by qwix: the oracle of adapters and bases of JAX trainers.

Run as a script in an environment with tunix, torch and peft, it writes `tests/fixtures/tunix`, which tests read where
tunix is not installed: for each family a base, a checkpoint of the LoRA, one of the whole model, and the logits that
tunix computes with each.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "tunix"
RANK, ALPHA = 3, 6.0
TOKENS = np.array([[5, 9, 21, 7, 2, 30, 3, 11]])
# tunix 0.1.7 takes this base for Llama whatever its settings say.
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
# Name -> family and settings of the tiny base; the second Gemma 3 has a key head for each query head.
BASES = {
    "llama": ("llama", {"tie_word_embeddings": True, **ROPE}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, **ROPE}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, **ROPE}),
    "gemma2": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3-keys": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 8, "num_key_value_heads": 2}),
}
SMALL = {
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
}
MODULES = ".*/(attn/(q_proj|k_proj|v_proj|o_proj|.*einsum)|mlp/.*_proj)"


def write_base(name: str, folder: Path) -> Path:
    """Write a tiny base with transformers."""
    from tiny_models import save_tiny, torch

    family, changes = BASES[name]
    return save_tiny(family, folder, dtype=torch.bfloat16, **(SMALL | changes))


def tunix_model(name: str, folder: Path):
    """Load a tiny base by tunix's own loader, float32."""
    import jax.numpy as jnp
    from tunix.models.gemma import model as gemma
    from tunix.models.gemma import params_safetensors as gemma_params
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.gemma3 import params_safetensors as gemma3_params
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params as llama_params
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params as qwen2_params
    from tunix.models.qwen3 import model as qwen3
    from tunix.models.qwen3 import params as qwen3_params

    config = json.loads((folder / "config.json").read_text())
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta")
    tied = config.get("tie_word_embeddings", True)
    sizes = {
        "num_layers": config["num_hidden_layers"],
        "embed_dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
    }
    text = {"vocab_size": config["vocab_size"], "rope_theta": theta, "norm_eps": config.get("rms_norm_eps")}
    window = {"num_embed": config["vocab_size"], "sliding_window_size": config.get("sliding_window")}
    match BASES[name][0]:
        case "llama":
            given = llama_params, llama.ModelConfig(**sizes, **text, weight_tying=tied)
        case "qwen2":
            given = qwen2_params, qwen2.ModelConfig(**sizes, **text, use_tied_embedding=tied)
        case "qwen3":
            given = qwen3_params, qwen3.ModelConfig(**sizes, **text, use_tied_embedding=tied)
        case "gemma2":
            kinds = gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL
            caps = {"final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0}
            norms = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
            given = gemma_params, gemma.ModelConfig(**sizes, **window, **caps, **norms, attention_types=kinds)
        case _:
            bases = {"local_base_frequency": 10_000, "global_base_frequency": 1_000_000}
            given = gemma3_params, gemma3.ModelConfig(**sizes, **window, **bases, param_dtype=jnp.float32)
    params, settings = given
    return params.create_model_from_safe_tensors(str(folder), settings, dtype=jnp.float32)


def with_lora(model, *, path: str = MODULES, rank: int = RANK, alpha: float = ALPHA, seed: int | None = None):
    """Apply qwix's LoRA, with random factors if a seed is given."""
    import jax
    import qwix
    from flax import nnx

    provider = qwix.LoraProvider(module_path=path, rank=rank, alpha=alpha)
    with jax.numpy_dtype_promotion("standard"):
        model = qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(0))
    if seed is not None:
        rng = np.random.default_rng(seed)
        state = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), state))
    return model


def quantised(model, qtype: str, *, tile: int | None = None, calibration: str = "absmax"):
    """Quantise the matrices by qwix; `minmax` gives zero points."""
    import jax
    import qwix

    rule = qwix.QuantizationRule(
        module_path=".*", weight_qtype=qtype, tile_size=tile, weight_calibration_method=calibration
    )
    with jax.numpy_dtype_promotion("standard"):
        return qwix.quantize_model(model, qwix.PtqProvider([rule]), **model.get_model_input())


def save_model(model, folder: Path, step: int = 7, *, lora_only: bool = False) -> Path:
    """Save a model by tunix's checkpoint manager."""
    from tunix.sft.checkpoint_manager import CheckpointManager

    manager = CheckpointManager(str(folder.absolute()))
    manager.save(step, model, save_only_lora_params=lora_only, force=True)
    manager.close()
    for mark in folder.rglob("commit_success.txt"):
        mark.write_text("Checkpoint commit was successful\n")  # it names the folder of this machine
    return folder


def save_lora(model, folder: Path) -> Path:
    """Save the LoRA alone."""
    return save_model(model, folder, lora_only=True)


def restore_lora(model, folder: Path) -> None:
    from tunix.sft.checkpoint_manager import CheckpointManager

    manager = CheckpointManager(str(folder.absolute()))
    manager.maybe_restore(model, restore_only_lora_params=True)
    manager.close()


def tunix_logits(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    import jax
    import jax.numpy as jnp

    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(model(jnp.asarray(tokens), positions, None, mask)[0], np.float32)


def write_fixtures() -> None:
    for name in ("llama", "gemma3"):
        folder = FIXTURES / name
        shutil.rmtree(folder, ignore_errors=True)
        base = write_base(name, folder / "base")
        (base / "generation_config.json").unlink(missing_ok=True)
        model = with_lora(tunix_model(name, base), seed=1)
        save_lora(model, folder / "lora")
        np.save(folder / "logits.npy", tunix_logits(model))
        write_whole(name)


def write_whole(name: str) -> None:
    """Write the whole model of a fixture: that of Llama with LoRA, that of Gemma quantised."""
    folder = FIXTURES / name
    model = tunix_model(name, folder / "base")
    if name == "llama":
        np.save(folder / "model_logits.npy", tunix_logits(model))
        model = with_lora(model, seed=1)
    else:
        model = quantised(model, "int4", tile=8, calibration="minmax")
        np.save(folder / "model_logits.npy", tunix_logits(model))
    save_model(model, folder / "model")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    write_fixtures()
