"""The settings of a distillation."""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self, get_args

from jcrosslora.checkpoint import ROLES, wanted_roles
from jcrosslora.errors import UsageError

FEWEST_COMPLETIONS = 16
MOST_TOKENS = 512  # of an answer whose length is learnt

USUAL, ROUND = 300, 48  # completions of a fit, and of each round after those that are written before it
ENOUGH, MOST_GIVEN = 200, 1000  # given prompts at which no others are written, and the most that are used by default
_HELD_OUT, _MOST_HELD = 0.15, 20  # share of the prompts that are held out, and the most of given ones
_TEXTS, _FEWEST_PASSES = 2400, 2  # with given prompts: texts over all passes together, and the fewest passes

End = Literal["auto", "source", "never"]


class FitSchedule(NamedTuple):
    """The settings that depend on whether a user gives prompts; see `DistillSettings`.

    Attributes:
        rounds: completions of each round, those written before the fit first; a budget goes on beyond them.
        repeats: how often each pass uses a labelled example: more than once if many prompts leave few passes.
    """

    passes: int
    rate: float
    temperature: float
    end: End
    rounds: tuple[int, ...] = ()
    repeats: int = 1

    @property
    def first(self) -> int:
        """Completions that are written before the fit."""
        return self.rounds[0]


# Teaching the end without prompts cost likelihood: the demo had 0.78 of the lift, and has 0.95.
PROMPTED, UNPROMPTED = FitSchedule(8, 1.5e-3, 0.0, "auto"), FitSchedule(4, 5e-4, 1.0, "source")


@dataclass(frozen=True)
class DistillSettings:
    """How `distill` fits an update."""

    completions: int | None = None
    """Number of prompts with answers, held-out ones included; at least 16. By default 300; with 200 given prompts or
    more, their number, at most 1,000. Those beyond 300, or with given prompts beyond 1,000, are written during the
    fit."""
    budget: str | None = None
    """Time for the whole fit, such as 20min, which is filled with new completions. The fit to the first 300 is always
    finished."""
    roles: tuple[str, ...] | None = None
    """The modules that are fitted, such as q_proj v_proj; all if not given."""
    passes: int | None = None
    """How often each completion is used; by default 4 times, with given prompts 8 times, and down to twice if these are
    more than 300."""
    fit_rank: int = 16
    """Rank of the update in each module, at most the module's short side."""
    rate: float | None = None
    """Peak learning rate; it rises over the first 1/20 of the fit, then decays to 0 as a cosine. By default 1.5e-3 with
    given prompts, else 5e-4: on prompts that the source wrote, higher rates learn their oddities."""
    polish: float = 0.25
    """Last share of a longer fit in which the target itself answers the prompts, with its update."""
    teacher_weight: float = 0.5
    """Share of the adapted source's predictions in the teacher if the source is unsure, 0 to 1; the rest is the
    target's."""
    sure_weight: float | None = None
    """The same if the adapted source is sure; in between, exp(-entropy) interpolates. By default 1 with given prompts.
    Without them it is between `teacher_weight` and 1, depending on how well the task search found the adapter's task:
    if it did not, the source may be sure of wrong answers."""
    contrast_weight: float = 0.25
    """Weight of the change that the adapter makes in the source's predictions, added to the teacher."""
    prompt_weight: float = 1.0
    """Weight of predictions inside a prompt; those inside an answer have 1."""
    example_weight: float = 1.0
    """Weight of the tokens of a labelled example's answer; those of the source's answers have 1."""
    held_out: float | None = None
    """Share of the completions written before the fit that nothing is fitted to; they decide which update is the best.
    By default 0.15, and at most 20 prompts where prompts are given, because those that are left bring right answers."""
    answer_tokens: int | None = None
    """The most tokens of an answer; if not given, learnt from a few answers, up to 512."""
    end: End = "auto"
    """The end of answers: as the source has it (source), not fitted (never), or (auto) as the source has it unless its
    answers to given prompts go on after they are complete; then they are cut there, and the end is taught."""
    own_prompts: int | None = None
    """Prompts that the adapter writes itself, if none are given and it knows those that it was trained on; 0 does not
    ask it. By default 200, and 0 without a search."""
    discovery: int = 48
    """Texts of each step of the search for what the adapter is for, where it has no prompts; 0 does not search."""
    answer_temperature: float | None = None
    """Temperature at which answers are sampled; if not given, 0 for answers to given prompts, else 1."""
    text_weight: float = 0.5
    """Share of the text itself in the teacher of answers that were written at temperature 0."""
    compared_tokens: int = 6000
    """How many of the commonest shared tokens predictions are compared on, added to those of the completions."""

    def teacher_weights(self, confidence: float) -> tuple[float, float, float]:
        """Return the shares of the adapted source where it is unsure and where it is sure, and the contrast's weight.

        They depend on how well the adapter's task is known, 0 to 1: 1 where prompts are given, see
        `DiscoveredTask.explained`.
        """
        sure = self.sure_weight
        if sure is None:
            sure = self.teacher_weight + (1 - self.teacher_weight) * confidence
        return self.teacher_weight, sure, self.contrast_weight

    def for_prompts(self, prompts: int, examples: int = 0) -> Self:
        """Return the settings with `completions` filled in; with enough prompts and examples, no others are written."""
        if self.completions is not None:
            return self
        enough = prompts + examples >= ENOUGH and prompts >= FEWEST_COMPLETIONS
        most = MOST_GIVEN if self.budget is None else USUAL
        return replace(self, completions=min(prompts, most) if enough else USUAL)

    def held_of(self, prompts: int, *, prompted: bool) -> int:
        """Return the number of different prompts to hold out, between 1 and `prompts` - 1."""
        count = round((self.held_out or _HELD_OUT) * prompts)
        if self.held_out is None and prompted:
            count = min(count, _MOST_HELD)
        return min(max(1, count), prompts - 1)

    def course(self, *, prompted: bool) -> FitSchedule:
        """Return these settings, with defaults for those that are not given."""
        usual, completions = PROMPTED if prompted else UNPROMPTED, self.completions or USUAL
        first = min(completions, MOST_GIVEN if prompted and self.budget is None else USUAL)
        temperature = usual.temperature if self.answer_temperature is None else self.answer_temperature
        end = usual.end if self.end == "auto" else self.end
        passes = max(_FEWEST_PASSES, min(usual.passes, _TEXTS // first))
        rounds = first, *((ROUND,) * -(-(completions - first) // ROUND))
        repeats = 1 if self.passes else usual.passes // passes
        return FitSchedule(self.passes or passes, self.rate or usual.rate, temperature, end, rounds, repeats)

    @property
    def own_prompt_count(self) -> int:
        """How many prompts the adapter is asked to write if none are given."""
        return (ENOUGH if self.discovery else 0) if self.own_prompts is None else self.own_prompts

    @property
    def seconds(self) -> float | None:
        """The budget, such as 90s, 20min or 1.5h, in seconds; None if it is missing, malformed or zero."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", (self.budget or "").strip())
        return (float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]] if found else 0.0) or None

    def check(self) -> None:
        """Raise UsageError if a setting is out of range."""
        least = {"fit_rank": 1, "passes": 1, "completions": FEWEST_COMPLETIONS}
        least |= {"answer_tokens": 1, "compared_tokens": 1, "discovery": 0}
        rules = {
            name: ((value := getattr(self, name)) is None or value >= fewest, f"{fewest} or more")
            for name, fewest in least.items()
        }
        asks = self.own_prompt_count == 0 or self.own_prompt_count >= FEWEST_COMPLETIONS
        rules["own_prompts"] = asks, f"0 or {FEWEST_COMPLETIONS} and more"
        rules["held_out"] = self.held_out is None or 0 < self.held_out < 1, "a share between 0 and 1"
        for name in ("teacher_weight", "sure_weight", "polish", "text_weight"):
            rules[name] = (value := getattr(self, name)) is None or 0 <= value <= 1, "a share from 0 to 1"
        rules["example_weight"] = 0 < self.example_weight < math.inf, "a positive number"
        rules["prompt_weight"] = 0 <= self.prompt_weight < math.inf, "a number from 0 on"
        temperature = self.answer_temperature
        rules["answer_temperature"] = temperature is None or 0 <= temperature < math.inf, "a number from 0 on"
        rules["rate"] = self.rate is None or 0 < self.rate < math.inf, "a positive number"
        rules["end"] = self.end in get_args(End), f"one of {', '.join(get_args(End))}"
        known = self.roles is None or (len(self.roles) > 0 and set(self.roles) <= set(ROLES))
        rules["roles"] = known, wanted_roles(self.roles)
        timed = self.budget is None or self.seconds is not None
        rules["budget"] = timed, "a time such as 90s, 20min or 1.5h"
        rules["contrast_weight"] = math.isfinite(self.contrast_weight), "a finite number, such as 0.25"
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise UsageError(f"distill with {name} {getattr(self, name)} was asked for, expected {wanted}")
