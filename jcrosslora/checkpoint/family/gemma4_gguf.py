"""What GGUF files of Gemma 4 state of its layers: by metadata with an entry for each, and by the tensors they have.

Files state the sizes of heads of full attention by the usual keys, and those of layers with windows by keys of their
own. That keys are the values of full attention is seen by the tensors alone.
"""

from collections.abc import Mapping
from typing import Any

from jcrosslora.checkpoint.family.rules import Gguf
from jcrosslora.checkpoint.family.sizes import size
from jcrosslora.errors import CheckpointError

_PATTERN, _SHARED = "attention.sliding_window_pattern", "attention.shared_kv_layers"
_KV, _WIDTH = "attention.head_count_kv", "feed_forward_length"


def _from_gguf(stated: Mapping[str, Any], held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the kinds of the layers, their sizes, and what the last of them share.

    Raises:
        CheckpointError: a list is missing, or does not fit the layers.
    """
    layers = size(stated, "block_count")
    sliding = stated.get(_PATTERN)
    if not isinstance(sliding, list) or len(sliding) != layers or not all(type(one) is bool for one in sliding):
        msg = f"{_PATTERN} is {str(sliding)[:60]}, wanted a list that says of {layers} layers which have windows"
        raise CheckpointError(msg)
    full = [layer for layer in range(layers) if not sliding[layer]]
    shared = stated.get(_SHARED, 0)
    if type(shared) is not int or not 0 <= shared < layers:
        msg = f"{_SHARED} is {str(shared)[:60]}, wanted fewer than {layers} layers"
        raise CheckpointError(msg)
    counts, widths = (_of_layers(stated, key, layers) for key in (_KV, _WIDTH))
    first = layers - shared
    wide = widths[-1] != widths[0]
    if widths != [widths[0]] * first + [(1 + wide) * widths[0]] * shared:
        msg = f"{_WIDTH} is {str(widths)[:60]}, wanted twice the width for the last {shared} layers, or one for all"
        raise CheckpointError(msg)
    own = {layer for layer in full if layer < first}
    return {
        "layer_types": ["sliding_attention" if flag else "full_attention" for flag in sliding],
        "head_dim": size(stated, "attention.key_length_swa"),
        "global_head_dim": size(stated, "attention.key_length"),
        "num_key_value_heads": next((counts[layer] for layer in range(layers) if sliding[layer]), counts[0]),
        "num_global_key_value_heads": counts[full[0]] if full else None,
        "attention_k_eq_v": bool(own) and not held.get("self_attn.v_proj.weight", frozenset()) & own,
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": stated.get("embedding_length_per_layer_input", 0),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": wide,
        "enable_moe_block": "router.proj.weight" in held,
    }


def _of_layers(stated: Mapping[str, Any], key: str, layers: int) -> list[int]:
    """Return a number of each layer, which files state once where it is the same for all."""
    value = stated.get(key)
    found: list[Any] = value if isinstance(value, list) else [value] * layers
    if len(found) != layers or not all(type(one) is int and one > 0 for one in found):
        msg = f"{key} is {str(value)[:60]}, wanted a positive integer, or one for each of {layers} layers"
        raise CheckpointError(msg)
    return found


GGUF = Gguf(
    "gemma4",
    tensors={
        "layer_output_scale.weight": "layer_scalar",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_down_exps.scale": "router.per_expert_scale",
    },
    # Without it llama.cpp takes 30, the class none; published models have it.
    numbers={"final_logit_softcapping": "final_logit_softcapping"},
    settings=_from_gguf,
)
