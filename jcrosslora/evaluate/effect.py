"""The effect of a moved adapter on the target, compared with that of the original on the source: plain data."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Outcome = Literal["ineffective", "destructive", "plausible", "unmeasured"]

# Bounds of the target's divergence over the source's. An adapter for ARC-Easy of SmolLM2-135M-Instruct, moved to
# Gemma-3-270M by theseus at scales 0.3, 1 and 2, has ratios of 0.15, 1.7 and 6.8; the answers to 32 training questions
# become more likely at 0.3, keep their likelihood at 1 and lose it at 2. Random factors of the same norm have 0.04.
INEFFECTIVE, DESTRUCTIVE = 0.05, 5.0
# Bound of the loss in log-likelihood of text written with the adapter, over the source's divergence. It is 0.03, 1.2
# and 5.2 at these scales (1.6 instead of 1.2 if the divergence is taken on the written text too), and 1.8 (2.4) at
# scale -1, at which the answers lose likelihood as well.
LOSS = 1.7
_ERRORS = 2.0  # standard errors
# In nats; a smaller divergence is rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Change:
    """The change that an adapter makes in the predictions of one base: nats a position, means over texts.

    Attributes:
        kl: KL(base || base with adapter) of the next token, over the whole vocabulary.
        kl_spread: standard deviation over texts of their mean; NaN for a single text.
        nll: negative log-likelihood (NLL) of the text under the base.
        nll_adapted: NLL of the text under the base with the adapter.
    """

    kl: float
    kl_spread: float
    nll: float
    nll_adapted: float

    @classmethod
    def of(cls, kl: np.ndarray, nll: np.ndarray, nll_adapted: np.ndarray) -> "Change":
        """Average over texts: the divergence of each, (texts,), and its NLL without and with the adapter, (texts',)."""
        return cls(float(np.mean(kl)), _deviation(kl), float(np.mean(nll)), float(np.mean(nll_adapted)))

    @property
    def growth(self) -> float:
        """Growth of the NLL by the adapter; negative where the text becomes more likely."""
        return self.nll_adapted - self.nll


@dataclass(frozen=True)
class Effect:
    """The effect of a moved adapter, at positions where tokens of both bases end, in the same texts.

    Attributes:
        source: change by the original adapter on the source.
        target: change by the moved adapter on the target; not finite where its predictions are not.
        excess: growth of the text's NLL on the target beyond what it should be, nats a position, mean over texts. For
            text that the source wrote with its adapter it is the target's growth, which should be negative; for other
            text the target's growth less the source's.
        excess_error: its standard error over texts; NaN for a single text.
        texts: number of texts, those for likelihoods included.
        positions: number of positions in them.
        written: whether the likelihoods are of text that the source wrote with its adapter.
    """

    source: Change
    target: Change
    excess: float
    excess_error: float
    texts: int
    positions: int
    written: bool

    @classmethod
    def of(
        cls,
        source: Change,
        target: Change,
        excess: np.ndarray,
        *,
        texts: int,
        positions: int,
        written: bool,
    ) -> "Effect":
        """Make the record of the excess of each text, (texts',)."""
        error = _deviation(excess) / math.sqrt(len(excess))
        return cls(source, target, float(np.mean(excess)), error, texts, positions, written)

    @property
    def share(self) -> float:
        """The target's divergence over the source's; NaN where the source's is only rounding."""
        return self.target.kl / self.source.kl if self.source.kl > _ROUNDING else math.nan

    @property
    def _finite(self) -> bool:
        return math.isfinite(self.target.kl) and math.isfinite(self.target.nll_adapted)

    @property
    def outcome(self) -> Outcome:
        """Judge the effect.

        "destructive": the target's predictions are no longer finite, its divergence is far above the source's, or the
        text becomes clearly less likely: `excess` is above 1.7 times the source's divergence and above two standard
        errors. "ineffective": the target's divergence is a small share of the source's. "unmeasured": the original
        adapter changes nothing on these texts. "plausible": none of these.
        """
        if not self._finite:
            return "destructive"
        if math.isnan(self.share):
            return "unmeasured"
        if self.share > DESTRUCTIVE or self.excess > max(LOSS * self.source.kl, _ERRORS * self.excess_error):
            return "destructive"
        return "ineffective" if self.share < INEFFECTIVE else "plausible"

    @property
    def sentence(self) -> str:
        """The outcome with its figures, without a full stop."""
        if not self._finite:
            return "the moved update is destructive: with it the target's predictions are not finite numbers"
        kl = f"KL {self.target.kl:.2g} nats a position against {self.source.kl:.2g} on the source"
        growth = f"log-likelihood of the text {-self.target.growth:+.2g} against {-self.source.growth:+.2g}"
        return {
            "ineffective": f"the moved update is ineffective ({kl}): it changes far less than the original does",
            "destructive": f"the moved update is destructive ({kl}; {growth}): do not use it at this strength",
            "plausible": f"the moved update has an effect of plausible size ({kl}; {growth})",
            "unmeasured": f"the effect cannot be judged: the original update changes nothing on these texts ({kl})",
        }[self.outcome]

    def rows(self) -> list[dict[str, str]]:
        """Format a row for each base, for tables."""
        return [
            {
                "base": name,
                "KL (nats a position)": f"{_number(one.kl)} ± {_number(one.kl_spread)}",
                "NLL without": _number(one.nll),
                "NLL with the adapter": _number(one.nll_adapted),
            }
            for name, one in (("source", self.source), ("target", self.target))
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data with the outcome and its sentence; figures that are not finite become null."""
        data = dataclasses.asdict(self) | {"share": self.share, "outcome": self.outcome, "sentence": self.sentence}
        return _finite(data)


def _deviation(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return None if isinstance(data, float) and not math.isfinite(data) else data
