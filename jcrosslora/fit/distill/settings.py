"""How a fit is done."""

from dataclasses import dataclass

# What attention passes on, not where it looks: all modules of a step have one length, and q and k, whose own best
# length is next to nothing, keep that of the others short.
VALUES = ("v_proj", "o_proj")


# Completions to a step: more steps on the same completions fit these and not others, and more completions in as many steps
# bring nothing.
PER_STEP = 100


@dataclass(frozen=True)
class FitSettings:
    """How a fit is done.

    Attributes:
        steps: number of steps; each has completions of its own.
        rank: of each step, or the short side of a module where that is less; the fitted update has `steps` times this
            rank on top of what it started from, but no more than the short side.
        roles: the modules that are fitted.
        teacher_weight: share of the adapted source's own predictions in the teacher, see `jcrosslora.fit.distill.reduced_base.teach`.
        contrast_weight: of the source's change in the teacher, on top of that.
        prompt_weight: of the predictions inside a prompt, where those inside an answer have 1.
        completions: prompts with answers in all, 16 or more, those held out included.
        held_out: share of the completions that no step is fitted on: they decide how long each step is.
        tokens: of an answer at most.
        temperature: of the answers.
        vocabulary: how many of the commonest shared tokens predictions are compared on, beside those of the completions.
    """

    steps: int = 3
    rank: int = 32
    roles: tuple[str, ...] = VALUES
    teacher_weight: float = 0.5
    contrast_weight: float = 0.25
    prompt_weight: float = 1.0
    completions: int = 300
    held_out: float = 0.15
    tokens: int = 12
    temperature: float = 1.0
    vocabulary: int = 6000

    @classmethod
    def of(cls, completions: int) -> "FitSettings":
        """The usual settings for a number of completions: a step for each hundred of them, but no fewer than usual."""
        return cls(completions=completions, steps=max(cls.steps, completions // PER_STEP))
