"""Tiny models of MaxText with LoRA: the oracle of its adapters.

Run as a script in an environment with MaxText 0.2.5 (Python 3.12; qwix, orbax-checkpoint and google-tunix, without
torch or jcrosslora), it writes `tests/fixtures/maxtext`: for each model of MaxText a base that its own converter
made of random weights, its LoRA with random factors, and the logits that MaxText computes without and with it. The
LoRA of Llama is a checkpoint of MaxText's trainer, step 5, the others are arrays by their keys, joined by dots.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "maxtext"
RANK, ALPHA = 2, 5.0
TOKENS = np.array([[5, 9, 21, 7, 2, 30, 3, 11]])
# Name -> MaxText's model, whether it scans over its layers, and its own number of layers (Gemma 2 counts pairs).
MODELS = {
    "llama": ("llama3.1-8b", True, 3),
    "mistral": ("mistral-7b", False, 2),
    "qwen2": ("qwen2.5-1.5b", True, 2),
    "qwen3": ("qwen3-0.6b", True, 2),
    "gemma": ("gemma-2b", True, 2),
    "gemma2": ("gemma2-2b", True, 2),
    "gemma3": ("gemma3-4b", True, 7),
}
_SIZES = {
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "torch_dtype": "bfloat16"},
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
_GEMMA2 = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_KINDS = [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
# What config.json says besides the sizes.
_CONFIGS = {
    "llama": {
        "rope_theta": 5e5,
        "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 8192},
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
    "mistral": {"rope_theta": 1e6, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "sliding_window": None},
    "qwen2": {"rope_theta": 1e6, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "qwen3": {"rope_theta": 1e6, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "gemma": {"rope_theta": 1e4, **_GEMMA},
    "gemma2": {"rope_theta": 1e4, "sliding_window": 4096, **_GEMMA2, **_GEMMA},
    "gemma3": {
        **{"query_pre_attn_scalar": 8, "sliding_window": 1024, "layer_types": _KINDS},
        **{"rope_parameters": _ROPES, **_GEMMA},
    },
}


def maxtext_config(name: str, folder: Path):
    """Return MaxText's configuration of a tiny model with LoRA on all linear layers."""
    import maxtext
    from maxtext.configs import pyconfig

    model, scanned, layers = MODELS[name]
    settings = {
        **{"model_name": model, "override_model_config": True, "scan_layers": scanned, "vocab_size": 32},
        **{"base_emb_dim": 16, "base_mlp_dim": 24, "base_num_query_heads": 2, "base_num_kv_heads": 1, "head_dim": 8},
        **{"base_num_decoder_layers": layers, "max_target_length": 8, "per_device_batch_size": 1, "packing": False},
        **{"dtype": "float32", "weight_dtype": "float32", "matmul_precision": "highest", "attention": "dot_product"},
        **{"skip_jax_distributed_system": True, "hardware": "cpu", "run_name": "run", "use_multimodal": False},
        **{"base_output_directory": folder, "lora.enable_lora": True, "lora.lora_rank": RANK, "dataset_type": "hf"},
        **{"lora.lora_alpha": ALPHA, "async_checkpointing": False, "enable_checkpointing": True},
    }
    file = Path(maxtext.__file__).parent / "configs" / "post_train" / "sft.yml"
    return pyconfig.initialize_pydantic(["", str(file), *(f"{key}={value}" for key, value in settings.items())])


def hugging_face(name: str, config, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert parameters, by their keys joined by "-", as MaxText does; it has no converter of Gemma and Mistral."""
    from maxtext.checkpoint_conversion.utils.hf_shape import HF_SHAPE
    from maxtext.checkpoint_conversion.utils.param_mapping import HOOK_FNS, PARAM_MAPPING
    from maxtext.checkpoint_conversion.utils.utils import process_maxtext_param

    model, scanned, _ = MODELS[name]
    values = config_json(name) | {"attention_bias": name == "qwen2"}
    if name == "gemma3":
        vision = {**values, "image_size": 8, "patch_size": 4, "num_channels": 3, "num_hidden_layers": 0}
        values = {"text_config": values, "vision_config": vision}
    table = model if model in PARAM_MAPPING else "llama3.1-8b"
    names = PARAM_MAPPING[table](values, config, scanned)
    hooks = HOOK_FNS[table](values, config, scanned, saving_to_hf=True)
    if table != model:  # the order of features is that of Hugging Face: leave that step of Llama 3.1 out
        hooks = {
            key: [step for step in np.atleast_1d(hook) if step.__name__ != "adjust_rope"] for key, hook in hooks.items()
        }
    if name == "gemma":
        norms = {"pre_self_attention_norm": "pre_self_attention_layer_norm"}
        norms["pre_ffw_norm"] = "post_self_attention_layer_norm"
        params = {"-".join(norms.get(part, part) for part in key.split("-")): array for key, array in params.items()}
        params = {key: array - 1 if "norm" in key else array for key, array in params.items()}
        params["params-token_embedder-embedding"] = params["params-token_embedder-embedding"] / 4  # sqrt(hidden)
    shapes = HF_SHAPE[table](values)
    found = {}
    for key, array in params.items():
        for path, converted in process_maxtext_param(key, array, names, hooks, shapes, config):
            found[path.replace("language_model.", "")] = np.ascontiguousarray(converted)
    return found


def config_json(name: str) -> dict:
    layers = MODELS[name][2] * (2 if name == "gemma2" else 1)
    family = "gemma3_text" if name == "gemma3" else name
    return {"model_type": family, "num_hidden_layers": layers, **_SIZES, **_CONFIGS[name]}


def named(state) -> dict[str, np.ndarray]:
    """Return the arrays of a state by their keys, joined by dots."""
    from flax import nnx

    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


def set_all(model, kind, spread: float, rng: np.random.Generator) -> None:
    """Draw variables anew, norms around 1, as numbers that bfloat16 holds."""
    import jax
    import ml_dtypes
    from flax import nnx

    def draw(path, leaf):
        center = 1.0 if "norm" in str(path) else 0.0
        return (center + spread * rng.normal(size=leaf.shape)).astype(ml_dtypes.bfloat16).astype(np.float32)

    nnx.update(model, jax.tree_util.tree_map_with_path(draw, nnx.state(model, kind)))


def maxtext_logits(model, mesh) -> np.ndarray:
    import jax.numpy as jnp

    with mesh:
        out = model(jnp.asarray(TOKENS), jnp.arange(TOKENS.shape[1])[None], enable_dropout=False)
    return np.asarray(out, np.float32)


def save_run(model, config, folder: Path) -> None:
    """Save LoRA and optimiser as step 5 of MaxText's trainer."""
    import optax
    from flax import nnx
    from maxtext.common import checkpointing, train_state_nnx

    optimiser = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.LoRAParam)
    manager = checkpointing.create_orbax_checkpoint_manager(str(folder), True, False, 1)
    checkpointing.save_checkpoint(manager, 5, train_state_nnx.TrainStateNNX(model, optimiser), config, force=True)
    manager.close()
    for mark in folder.rglob("commit_success.txt"):
        mark.write_text("Checkpoint commit was successful\n")  # it names the folder of this machine


def write_fixture(name: str) -> None:
    from flax import nnx
    from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils
    from safetensors.numpy import save_file

    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "base").mkdir(parents=True)
    config = maxtext_config(name, folder)
    mesh = maxtext_utils.get_mesh_from_config(config)
    model = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(params=0, dropout=1))
    rng = np.random.default_rng(0)
    set_all(model, nnx.Param, 0.4, rng)
    params = {f"params-{key.replace('.', '-')}": array for key, array in named(nnx.state(model, nnx.Param)).items()}
    save_file(hugging_face(name, config, params), folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text(json.dumps(config_json(name), indent=1) + "\n")
    np.save(folder / "base_logits.npy", maxtext_logits(model, mesh))
    model = lora_utils.apply_lora_to_model(model, mesh, config)
    set_all(model, nnx.LoRAParam, 0.3, rng)
    np.save(folder / "logits.npy", maxtext_logits(model, mesh))
    if name == "llama":
        save_run(model, config, folder / "run")
    else:
        np.savez_compressed(folder / "lora.npz", **named(nnx.state(model, nnx.LoRAParam)))


if __name__ == "__main__":
    for one in sys.argv[1:] or MODELS:
        write_fixture(one)
