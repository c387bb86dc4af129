"""Which modules of an adapter's file belong to experts, by their names."""

import re

from jcrosslora.checkpoint.wrapped import text_module_name

_BLOCK = r"^model\.layers\.(\d+)\.(?:(?:mlp|block_sparse_moe|feed_forward|mixer)\.)?"
# peft nests the wrappers of two parameters of one module.
WHOLE = re.compile(_BLOCK + r"experts(?:\.base_layer)*$")
SINGLE = re.compile(_BLOCK + r"experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)$")
_ROUTER = re.compile(_BLOCK + r"(?:gate|gate\.wg|router|router\.(?:layer|proj))$")


def is_of_experts(module: str) -> bool:
    """Whether a module of an adapter's file holds factors of experts."""
    name = text_module_name(module)
    return WHOLE.match(name) is not None or SINGLE.match(name) is not None


def is_router(module: str) -> bool:
    """Whether a module of an adapter's file is the router of experts."""
    return _ROUTER.match(text_module_name(module)) is not None
