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
        adapter: in memory, a path or a hub id. None for a server, which holds it, and in an estimate for an adapter of
            all source modules.
        probes: the user's text; None if there is none.
        profile: the file format that the result is meant for.
        revision: revision of the adapter's hub id.
        rank: truncate the adapter's updates to this rank when reading them; ignored for a queried source.
        alpha: alpha of the training, for checkpoints of JAX trainers that do not state it.
    """

    adapter: Any
    method: Method | Auto
    options: TransferOptions
    probes: Probes | None = None
    profile: Profile = "peft"
    revision: str | None = None
    rank: int | None = None
    alpha: float | None = None
