"""The job of a transfer: what the user asked for."""

from dataclasses import dataclass
from typing import Any

from jcrosslora.adapter.save import Profile
from jcrosslora.evaluate.probes import Probes
from jcrosslora.methods import Auto, Method
from jcrosslora.session.settings import TransferOptions


@dataclass(frozen=True, eq=False)
class Job:
    """What a user asked for: an adapter to move, or to estimate, by a method.

    Attributes:
        adapter: in memory, a path or a hub id; None for a server, which has its own, and in an estimate for any adapter
            that has all modules of the source.
        probes: the user's text; None if there is none.
        profile: the file format that the result is meant for.
        revision: of the adapter's hub id.
        rank: the largest rank at which an update of the adapter is read; a source that can only be queried reads all.
        alpha: of LoRA of a JAX trainer that does not hold it.
    """

    adapter: Any
    method: Method | Auto
    options: TransferOptions
    probes: Probes | None = None
    profile: Profile = "peft"
    revision: str | None = None
    rank: int | None = None
    alpha: float | None = None
