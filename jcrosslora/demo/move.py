"""Move the demo's adapter. No other module of the demo calls a transfer."""

from pathlib import Path

from jcrosslora.adapter import load_adapter
from jcrosslora.alignment.align import align
from jcrosslora.checkpoint import BaseModel
from jcrosslora.demo.fetch import GEMMA3
from jcrosslora.session.transfer import TransferSettings, transfer
from jcrosslora.shifting.shift import MovedAdapter, shift

# A third of the usual number: the move takes about 90 seconds on two cores.
COMPLETIONS = 100


def move(
    adapter: Path, bases: tuple[BaseModel, BaseModel], method: str, out: Path, *, overwrite: bool, progress: bool
) -> MovedAdapter:
    """Move an adapter by any method and write it to `out`, whole or not at all.

    Raises:
        JCrossLoRAError: the method or the place to write to cannot be used.
    """
    settings = TransferSettings(
        *(str(adapter), bases[0].ref, bases[1].ref, str(out)),
        method=method,
        completions=COMPLETIONS,
        target_name=GEMMA3.hub_id,
        effect="never",  # the demo scores the target's answers instead
        overwrite=overwrite,
    )
    return transfer(settings, progress=progress)


def move_by_maps(adapter: Path, bases: tuple[BaseModel, BaseModel], method: str, *, progress: bool) -> MovedAdapter:
    """Move an adapter in memory by a method of maps alone, such as random or cross-lora."""
    loaded = load_adapter(str(adapter), bases[0])
    return shift(align(*bases, method=method, sources=loaded.modules.keys(), progress=progress), loaded)
