"""Write a llama checkpoint of any size that takes no room on disk: all zeros, in sparse files.

    python tools/sparse_base.py OUT [--hidden 4096 --intermediate 11008 --layers 32 --heads 32 --kv-heads 32]

With an adapter beside it (OUT-adapter: random factors of rank 8 for all modules of the first and the last layer), to
measure what a move between models of 7B parameters takes in memory, without having them:

    python tools/measure_memory.py OUT-adapter OUT OTHER --method cross-lora
"""

import argparse
import json
import os
import struct
from pathlib import Path

import numpy as np

import jcrosslora as jcl


def tensors(arguments: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors."""
    hidden, wide, size = arguments.hidden, arguments.intermediate, arguments.hidden // arguments.heads
    key_rows = arguments.kv_heads * size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arguments.vocab, hidden)}
    for layer in range(arguments.layers):
        inside = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_rows, hidden),
            "self_attn.v_proj": (key_rows, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (arguments.vocab, hidden)}


def write(arguments: argparse.Namespace) -> None:
    """The folder: config.json, and one safetensors file whose data is a hole."""
    out: Path = arguments.out
    out.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "vocab_size": arguments.vocab,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    header, end = {}, 0
    for name, shape in tensors(arguments).items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (out / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        os.truncate(file.fileno(), 8 + len(text) + end)


def write_adapter(arguments: argparse.Namespace) -> Path:
    """Random factors for all modules of the first and the last layer."""
    rng, base = np.random.default_rng(0), jcl.open_base(arguments.out)
    modules = {
        name: jcl.LoRAFactors(
            a=rng.standard_normal((8, module.shape[1]), np.float32) * 0.01,
            b=rng.standard_normal((module.shape[0], 8), np.float32) * 0.01,
        )
        for name, module in base.modules.items()
        if module.layer in (0, arguments.layers - 1)
    }
    out = adapter_folder(arguments.out)
    return jcl.save_adapter(jcl.Adapter(modules=modules), out, base_name=str(arguments.out))


def adapter_folder(out: Path) -> Path:
    """Where the adapter lies."""
    return out.with_name(f"{out.name}-adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    sizes = {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32, "kv-heads": 32, "vocab": 32000}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    arguments = parser.parse_args()
    if arguments.out.exists() or adapter_folder(arguments.out).exists():
        parser.error(f"{arguments.out} or its adapter exists already: choose another name, or remove both")
    if arguments.hidden % arguments.heads or arguments.heads % arguments.kv_heads:
        counts = f"{arguments.heads} heads and {arguments.kv_heads} key heads"
        parser.error(f"{counts} do not divide a width of {arguments.hidden} evenly: change one of them")
    write(arguments)
    adapter = write_adapter(arguments)
    print(f"{arguments.out}: {sum(int(np.prod(shape)) for shape in tensors(arguments).values()) / 1e9:.1f}e9 numbers")
    print(adapter)


if __name__ == "__main__":
    main()
