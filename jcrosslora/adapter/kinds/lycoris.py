"""The settings that LoHa and LoKr share: `r`, `alpha` and patterns of both."""

from jcrosslora.adapter.config import check_numbers, check_targets
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Config
from jcrosslora.adapter.kinds.plain import pattern_name
from jcrosslora.adapter.patterns import module_alpha, module_rank
from jcrosslora.errors import AdapterError


def check_lycoris(config: Config, where: str) -> None:
    """Refuse invalid ranks and scales.

    Raises:
        AdapterError: `r`, `alpha` or one of the patterns is missing or invalid.
    """
    check_numbers(config, where, alpha="alpha")
    check_targets(config, where)


def module_scale(file: AdapterFile, module: str, rank: int | None = None) -> float:
    """Return alpha / r of a module.

    Args:
        file: the adapter.
        module: as the file spells it.
        rank: of its tensors, to compare with the configuration; None if they do not show it.

    Raises:
        AdapterError: the rank of the tensors is not that of the configuration.
    """
    name = pattern_name(file.config, module)
    stated = module_rank(file.config, name)
    if rank is not None and rank != stated:
        msg = f"{file.path}: module {module!r} has rank {rank}, adapter_config.json says {stated}"
        msg += ": correct r or rank_pattern, or use the configuration that belongs to the file"
        raise AdapterError(msg)
    return module_alpha(file.config, name, default="alpha") / stated
