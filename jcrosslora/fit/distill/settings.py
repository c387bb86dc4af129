"""The settings of a distillation."""

import math
import re
from dataclasses import dataclass

from jcrosslora.errors import UsageError

# What attention passes on, not where it looks: all modules of a step have one length, and q and k, whose own best
# length is next to nothing, keep that of the others short.
VALUES = ("v_proj", "o_proj")
FEWEST_COMPLETIONS = 16

# More steps on the same completions fit these and not others, and more completions in as many steps bring nothing.
_COMPLETIONS_A_STEP, _FEWEST_STEPS = 100, 3


@dataclass(frozen=True)
class DistillSettings:
    """How `distill` fits an update."""

    completions: int = 300
    """Prompts with answers in all, 16 or more, those held out included."""
    steps: int | None = None
    """Steps of the fit, each on completions of its own; None makes one for each hundred completions, but at least 3."""
    step_rank: int = 32
    """Rank of each step, at most the short side of a module; the ranks of all steps add up."""
    roles: tuple[str, ...] = VALUES
    """The modules that are fitted."""
    teacher_weight: float = 0.5
    """Share of the adapted source's own predictions in the teacher, 0 to 1; the rest is the target's."""
    contrast_weight: float = 0.25
    """Weight of the change that the adapter makes in the source's predictions, added to the teacher."""
    prompt_weight: float = 1.0
    """Weight of predictions inside a prompt; those inside an answer have 1."""
    held_out: float = 0.15
    """Share of the completions that no step is fitted on; they decide how long each step is."""
    answer_tokens: int | None = None
    """The most tokens of an answer; None learns from a few answers how long they are, up to 512."""
    discovery: int = 48
    """Texts of each step of the search for what the adapter is for, where no prompts are given; 0 does not search."""
    answer_temperature: float = 1.0
    """Temperature at which answers are sampled."""
    refit: int = 0
    """Completions that are written anew for gradient steps in all modules, behind the closed-form steps."""
    budget: str | None = None
    """Time for the whole fit, such as 20min: what the closed-form steps leave is spent on gradient steps."""
    refit_rank: int = 16
    """Rank of what gradient steps add to each module."""
    refit_rate: float = 1e-3
    """Highest learning rate of gradient steps."""
    polish: float = 0.25
    """Share of the gradient steps, the last ones, on answers that the target writes itself."""
    compared_tokens: int = 6000
    """How many of the commonest shared tokens predictions are compared on, beside those of the completions."""

    @property
    def step_count(self) -> int:
        """The number of steps that `steps` asks for."""
        if self.steps is not None:
            return self.steps
        return max(_FEWEST_STEPS, self.completions // _COMPLETIONS_A_STEP)

    @property
    def seconds(self) -> float | None:
        """The budget in seconds, None without one."""
        return None if self.budget is None else parse_duration(self.budget)

    @property
    def refits(self) -> bool:
        """Whether gradient steps follow the closed-form ones."""
        return self.refit > 0 or self.budget is not None

    def check(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a setting is out of range.
        """
        least = {
            "step_count": 1,
            "step_rank": 1,
            "completions": FEWEST_COMPLETIONS,
            "answer_tokens": 1,
            "compared_tokens": 1,
            "discovery": 0,
            "refit": 0,
            "refit_rank": 1,
        }
        found = {name: getattr(self, name) for name in least}
        rules = {
            name: (found[name] is None or found[name] >= fewest, f"{fewest} or more") for name, fewest in least.items()
        }
        rules["held_out"] = 0 < self.held_out < 1, "a share between 0 and 1"
        rules["teacher_weight"] = 0 <= self.teacher_weight <= 1, "a share from 0 to 1"
        rules["polish"] = 0 <= self.polish <= 1, "a share from 0 to 1"
        rules["refit_rate"] = 0 < self.refit_rate < math.inf, "a positive number"
        timed = self.budget is None or parse_duration(self.budget) is not None
        rules["budget"] = timed, "a time such as 90s, 20min or 1.5h"
        rules["contrast_weight"] = math.isfinite(self.contrast_weight), "a finite number, such as 0.25"
        for name, (holds, wanted) in rules.items():
            if not holds:
                msg = f"distill with {name.removesuffix('_count')} {getattr(self, name)} was asked for, wanted {wanted}"
                raise UsageError(msg)


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")


def parse_duration(text: str) -> float | None:
    """Return the seconds of a time such as 90s, 20min or 1.5h; None for any other text, and for no time at all."""
    found = _DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]] if found else 0.0
    return seconds or None
