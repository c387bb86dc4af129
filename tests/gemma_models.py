"""Tiny models of google-deepmind/gemma with its LoRA: the oracle of adapters that were trained with it.

Run as a script in an environment with gemma 4.0.1 and what its `gm.nn` imports (Python 3.12 or newer; jax, flax,
kauldron, tensorflow-cpu, safetensors, without torch or jcrosslora), it writes `tests/fixtures/gemma`: for each model a
base of random weights by the names of Hugging Face, its LoRA with random factors, and the logits that the library
computes without and with it. The LoRA of gemma2 is in a checkpoint of Kauldron's trainer, step 5, that of gemma3 was
written by `gm.ckpts.save_params`, and the third is arrays by their keys, joined by dots.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "gemma"
RANK = 2
TOKENS = np.array([[5, 9, 21, 7, 2, 30, 3, 11]])
# Name -> the library's class and its number of key heads: with as many as query heads, q, k and v are one parameter.
MODELS = {"gemma2": ("Gemma2_2B", 2), "gemma3": ("Gemma3_4B", 2), "gemma2-keys": ("Gemma2_9B", 4)}
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8, "num_attention_heads": 4, "vocab_size": 32}
_WINDOW = 3
_SETTINGS = {
    **{"num_hidden_layers": 2, "query_pre_attn_scalar": 8, "sliding_window": _WINDOW, "max_position_embeddings": 64},
    **{"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"},
}
_GEMMA2 = {"rope_theta": 1e4, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_GEMMA3 = {"rope_parameters": _ROPES, "layer_types": ["sliding_attention", "full_attention"]}
_NORMS = {
    **{"pre_attention_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"},
    **{"pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
    **{"attn._query_norm": "self_attn.q_norm", "attn._key_norm": "self_attn.k_norm"},
}


def config_json(name: str) -> dict:
    family, changes = ("gemma3_text", _GEMMA3) if name == "gemma3" else ("gemma2", _GEMMA2)
    return {"model_type": family, "num_key_value_heads": MODELS[name][1], **_SIZES, **_SETTINGS, **changes}


def gemma_model(name: str):
    """Return the library's model with the sizes of a tiny one, a layer with a window and one without."""
    import jax.numpy as jnp
    from gemma import gm

    kind, key_heads = MODELS[name]
    model = getattr(gm.nn, kind)
    sizes = {
        **{"num_embed": 32, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8},
        **{"num_kv_heads": key_heads, "sliding_window_size": _WINDOW, "vision_encoder": None},
    }
    kinds = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
    return model(config=replace(model.config, attention_types=kinds, **sizes), dtype=jnp.float32)


def random_params(model, rng: np.random.Generator) -> dict:
    """Draw the parameters of a model, as numbers that bfloat16 holds."""
    import jax
    import ml_dtypes

    def draw(leaf):
        return (0.4 * rng.normal(size=leaf.shape)).astype(ml_dtypes.bfloat16).astype(np.float32)

    return jax.tree.map(draw, model.init(jax.random.key(0), TOKENS)["params"])


def named(tree: dict) -> dict[str, np.ndarray]:
    """Return the arrays of a tree by their keys, joined by dots."""
    from flax.traverse_util import flatten_dict

    return {key: np.asarray(array) for key, array in flatten_dict(tree, sep=".").items()}


def hugging_face(params: dict[str, np.ndarray], *, transposed: bool) -> dict[str, np.ndarray]:
    """Rename and turn parameters; `transposed` if the gates are (2, hidden_dim, features)."""
    found = {}
    for key, array in params.items():
        name, _, last = key.rpartition(".")
        layer, _, place = name.partition(".")
        prefix = f"model.layers.{layer.removeprefix('layer_')}."
        if key == "embedder.input_embedding":
            found["model.embed_tokens.weight"] = array
        elif key == "final_norm.scale":
            found["model.norm.weight"] = array
        elif last == "scale":
            found[f"{prefix}{_NORMS[place]}.weight"] = array
        elif place == "attn.attn_vec_einsum":  # (heads, head_dim, features)
            found[f"{prefix}self_attn.o_proj.weight"] = array.reshape(-1, array.shape[-1]).T
        elif place.startswith("attn."):  # ([parts,] heads, features, head_dim)
            roles = place.removeprefix("attn.").removesuffix("_einsum")
            for role, part in zip(roles, array if len(roles) > 1 else [array], strict=True):
                found[f"{prefix}self_attn.{role}_proj.weight"] = np.swapaxes(part, 1, 2).reshape(-1, part.shape[1])
        elif last == "linear":
            found[f"{prefix}mlp.down_proj.weight"] = array.T
        else:
            for role, part in zip(("gate", "up"), array, strict=True):
                found[f"{prefix}mlp.{role}_proj.weight"] = part if transposed else part.T
    return {key: np.ascontiguousarray(array) for key, array in found.items()}


def gemma_logits(model, params: dict) -> np.ndarray:
    return np.asarray(model.apply({"params": params}, TOKENS).logits, np.float32)


def save_run(params: dict, folder: Path) -> None:
    """Save all parameters and the moments of the LoRA as step 5 of Kauldron's trainer."""
    import optax
    from kauldron import kd

    optimiser = kd.optim.partial_updates(optax.sgd(0.1, momentum=0.9), mask=kd.optim.select("lora"))
    state = kd.train.TrainState(step=5, params=params, opt_state=optimiser.init(params), collections={})
    checkpointer = kd.ckpts.Checkpointer(workdir=folder, save_interval_steps=1)
    checkpointer.save(state, step=5, force=True)
    checkpointer.wait_until_finished()


def write_fixture(name: str) -> None:
    import ml_dtypes
    from gemma import gm, peft
    from safetensors.numpy import save_file

    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "base").mkdir(parents=True)
    model = gemma_model(name)
    wrapped = gm.nn.LoRA(rank=RANK, model=model, dtype=np.float32)
    params = random_params(wrapped, np.random.default_rng(0))
    original, lora = peft.split_params(params)
    base = hugging_face(named(original), transposed=model.config.transpose_gating_einsum)
    stored = {key: array.astype(ml_dtypes.bfloat16) for key, array in base.items()}
    save_file(stored, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text(json.dumps(config_json(name), indent=1) + "\n")
    np.save(folder / "base_logits.npy", gemma_logits(model, original))
    np.save(folder / "logits.npy", gemma_logits(wrapped, params))
    if name == "gemma2":
        save_run(params, folder / "run")
    elif name == "gemma3":
        gm.ckpts.save_params(lora, (folder / "lora").absolute(), wait_until_finished=True)
    else:
        np.savez_compressed(folder / "lora.npz", **named(lora))
    for mark in folder.rglob("commit_success.txt"):
        mark.write_text("Checkpoint commit was successful\n")  # it names the folder of this machine


if __name__ == "__main__":
    for one in sys.argv[1:] or MODELS:
        write_fixture(one)
