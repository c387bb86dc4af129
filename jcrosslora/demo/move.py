"""Move the demo's adapter. No other module of the demo calls a transfer."""

from pathlib import Path

from jcrosslora.checkpoint import BaseModel
from jcrosslora.methods import AUTO, Auto, find_method, make_method
from jcrosslora.session.result import TransferResult
from jcrosslora.session.transfer import transfer

# A third of the usual number: the move takes about 90 seconds on two cores.
COMPLETIONS = 100


def move(adapter: Path, bases: tuple[BaseModel, BaseModel], method: str, *, progress: bool) -> TransferResult:
    """Move an adapter by any method; an update is fitted to fewer completions than usual.

    Raises:
        JCrossLoRAError: the method cannot be used.
    """
    chosen = make_method(Auto(completions=COMPLETIONS))
    if method != AUTO:
        settings = {"completions": COMPLETIONS} if hasattr(find_method(method), "completions") else {}
        chosen = make_method(method, settings)
    # The demo scores the target's answers in place of the effect.
    return transfer(adapter, *bases, chosen, effect="never", progress=progress)
