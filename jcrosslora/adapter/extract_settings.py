"""How much of a difference is kept: one rank, a share of each module's energy, or a number of bytes for all modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from jcrosslora.adapter.contents import FileDtype
from jcrosslora.adapter.difference import Leading
from jcrosslora.errors import UsageError
from jcrosslora.utils.files import parse_size
from jcrosslora.utils.settings import Settings

Kept = Literal["norms", "biases", "embeddings"]
_RANK = 16


@dataclass(frozen=True)
class ExtractSettings(Settings):
    """The settings of an extraction; one of rank, energy and budget decides the ranks."""

    rank: int | None = None
    """Rank of every module; 16 if neither an energy nor a budget is given."""
    energy: float | None = None
    """For each module the lowest rank that holds this share of its difference's squared Frobenius norm, such as 0.9."""
    budget: str | None = None
    """Bytes of all factors together, such as 20MB: what holds most for its bytes is kept, whatever module it is in."""
    max_rank: int | None = None
    """The highest rank of a module, for an energy or a budget; it saves time."""
    keep: tuple[Kept, ...] = ()
    """What else of the difference is kept, whole: norms, biases, embeddings (with the output head)."""
    dtype: FileDtype = "float32"
    """Number format of the file, in which the budget counts."""

    def __post_init__(self) -> None:
        """Raise UsageError for values out of range, and for more than one of rank, energy and budget."""
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            msg = f"{' and '.join(given)} were given, wanted one of them, which decides the ranks: leave out the others"
            raise UsageError(msg)
        rules = {
            "rank": (self.rank is None or self.rank >= 1, "1 or more"),
            "energy": (self.energy is None or 0 < self.energy <= 1, "a share above 0, up to 1"),
            "budget": (self.budget is None or self._bytes > 0, "a number of bytes such as 20MB"),
            "max_rank": (self.max_rank is None or (self.max_rank >= 1 and self.mixed), "1 or more, not with rank"),
            "keep": (set(self.keep) <= {*get_args(Kept)}, f"some of {', '.join(get_args(Kept))}"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                msg = f"extraction with {name} {getattr(self, name)!r}: wanted {wanted}"
                raise UsageError(msg)

    @property
    def mixed(self) -> bool:
        """Whether each module has a rank of its own."""
        return self.energy is not None or self.budget is not None

    @property
    def rule(self) -> str:
        """What decides the ranks, in words."""
        if self.energy is not None:
            return f"{self.energy:.4g} of each module's energy"
        return f"rank {self.rank or _RANK}" if self.budget is None else f"{self.budget} of factors"

    def limit(self, shape: tuple[int, ...]) -> int:
        """Return the highest rank that a module (O, I) can get."""
        most = (self.max_rank or min(shape)) if self.mixed else self.rank or _RANK
        return most if self.budget is None else min(most, self._bytes // self._cost(shape))

    def choose(self, found: Mapping[str, Leading], name: str, new: Leading) -> dict[str, Leading]:
        """Add a module's difference to those of others, all cut to their ranks.

        Of all triplets a budget takes those with the most energy for their bytes. What does not fit among some modules
        fits among more of them even less, so it is dropped at once, and memory stays at the budget.
        """
        if self.budget is None:
            return {**found, name: new if self.energy is None else new.cut(new.lowest_rank(self.energy))}
        found = {**found, name: new}
        sizes = [len(one.s) for one in found.values()]
        owners = np.repeat(np.arange(len(found)), sizes)
        cost = np.repeat([self._cost(one.factors.shape) for one in found.values()], sizes)
        worth = np.square(np.concatenate([one.s for one in found.values()]), dtype=np.float64) / cost
        order = np.argsort(-worth, kind="stable")
        taken = order[np.cumsum(cost[order]) <= self._bytes]
        ranks = np.bincount(owners[taken], minlength=len(found))
        return {name: one.cut(int(rank)) for (name, one), rank in zip(found.items(), ranks, strict=True)}

    @property
    def _bytes(self) -> int:
        return parse_size(str(self.budget or "")) or 0

    def _cost(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that each rank of a module (O, I) takes."""
        return sum(shape) * (4 if self.dtype == "float32" else 2)
