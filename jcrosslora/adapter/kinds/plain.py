"""Plain LoRA of any scale and initialisation: dW = s B A on an unchanged base; and activated LoRA.

aLoRA (arXiv 2504.12397) has the weights of a plain LoRA and is active only from the last occurrence of certain tokens
on. `maps.other_changes` translates the tokens to another tokenizer.
"""

from collections.abc import Sequence

import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.config import ALORA as ALORA_VARIANT
from jcrosslora.adapter.config import Config, check_lora, is_variant
from jcrosslora.adapter.kinds.kind import AdapterFile, Kind, Update, each_module
from jcrosslora.adapter.names import TensorName
from jcrosslora.adapter.patterns import file_scale, module_rank, pattern_name
from jcrosslora.errors import AdapterError


def read_factors(file: AdapterFile, module: str) -> LoRAFactors:
    """Read the stored A (K, I) and B (O, K) of a module, with the scale that the configuration gives it.

    Raises:
        AdapterError: one of them is missing or damaged, or their rank is not the configuration's.
    """
    a, b = read_pair(file, module)
    if a.shape[0] != b.shape[1]:
        msg = f"{file.path}: module {module!r} has A of shape {list(a.shape)} and B of shape {list(b.shape)}"
        raise AdapterError(msg + ": A [r, in] and B [out, r] of one rank were wanted; the file is damaged")
    check_rank_of(file, module, a.shape[0])
    return LoRAFactors(a=a, b=b, scale=file_scale(file.config, module, a.shape[0]))


def check_rank_of(file: AdapterFile, module: str, rank: int) -> int:
    """Return the rank of a module, or raise an AdapterError if the configuration states another one."""
    stated = module_rank(file.config, pattern_name(file.config, module))
    if rank != stated:
        msg = f"{file.path}: module {module!r} has rank {rank}, adapter_config.json says {stated}"
        raise AdapterError(msg + ": correct r or rank_pattern, or use the configuration that belongs to the file")
    return rank


def read_pair(file: AdapterFile, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Read lora_A and lora_B of a module as they are stored.

    Raises:
        AdapterError: one of them is missing or damaged.
    """
    parts = file.modules[module].keys() & {"A", "B"}
    if len(parts) != 2:
        have = min(parts, default="")
        missing = {"A": "lora_A without its lora_B", "B": "lora_B without its lora_A", "": "neither lora_A nor lora_B"}
        msg = f"{file.path}: module {module!r} has {missing[have]}: the file is incomplete; save or download it again"
        raise AdapterError(msg)
    return file.part(module, "A"), file.part(module, "B")


def read_embedding_factors(file: AdapterFile, tensors: Sequence[TensorName]) -> LoRAFactors:
    """Read the LoRA of an embedding as an update of its V rows: a (K, D), b (V, K).

    Args:
        file: the adapter.
        tensors: `lora_embedding_A` (K, V) and `lora_embedding_B` (D, K) of one embedding.

    Raises:
        AdapterError: one of them is damaged, or their ranks differ.
        KeyError: one of them is missing.
    """
    keys = {tensor.key[-1]: tensor.key for tensor in tensors}
    a, b = (file.read(keys[side]) for side in "AB")
    if a.shape[0] != b.shape[1]:
        msg = f"its factors have ranks {a.shape[0]} and {b.shape[1]}"
        raise AdapterError(msg)
    scale = file_scale(file.config, tensors[0].module, a.shape[0])
    return LoRAFactors(a=np.ascontiguousarray(b.T), b=np.ascontiguousarray(a.T), scale=scale)


PLAIN = Kind(
    name="LoRA",
    peft_type="LORA",
    formula="s B A",
    read=each_module(lambda file, module: Update(read_factors(file, module))),
    check=check_lora,
)


def invocation_of(config: Config) -> tuple[int, ...] | None:
    """Return the token ids from which on an adapter is active; None if it is always active."""
    tokens = config.get("alora_invocation_tokens")
    return None if tokens is None else tuple(tokens)


def _check_alora(config: Config, where: str) -> None:
    check_lora(config, where)
    tokens = config["alora_invocation_tokens"]
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        msg = f"{where}: alora_invocation_tokens is {str(tokens)[:60]}, a list of token ids was wanted: correct the "
        raise AdapterError(msg + "file")


ALORA = Kind(
    name="aLoRA",
    peft_type="LORA",
    formula="s B A after its invocation tokens",
    read=PLAIN.read,
    check=_check_alora,
    applies=lambda config, _: is_variant(config, ALORA_VARIANT),
)
