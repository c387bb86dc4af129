"""Supported checkpoints of compressed-tensors; their weights are read by `fp8`, `int8` and `pack_quantized`.

Source: https://github.com/vllm-project/compressed-tensors.
"""

from jcrosslora.checkpoint.quantised.format import Settings

METHOD = "compressed-tensors"
_READ = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_MIXED = "mixed-precision"  # each group of modules states its own


def compressed_obstacle(settings: Settings) -> str | None:
    """Return why a checkpoint cannot be read (format, sparse storage, rotations at run time), None if it can."""
    if settings.get("quant_method") != METHOD:
        return None
    whole, groups = settings.get("format"), settings.get("config_groups")
    if whole == _MIXED and isinstance(groups, dict):
        own = [group.get("format") for group in groups.values() if isinstance(group, dict)]
    else:
        own = [whole]
    if unread := [name for name in own if name not in _READ]:
        return f"its format is {unread[0]!r}, wanted one of {', '.join(_READ)}"
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        return f"its weights are stored sparse ({sparsity['format']!r})"
    return "its weights are rotated (transform_config)" if settings.get("transform_config") else None
