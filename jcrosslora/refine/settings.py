"""How a fit is done; in a module of its own so that flags and reports can be built without JAX."""

from dataclasses import dataclass

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class FitSettings:
    """How a fit is done.

    Attributes:
        steps: number of steps; each has dialogues of its own.
        rank: of each step; the fitted update has rank `steps * rank` on top of what it started from.
        roles: the modules that are fitted.
        trust: share of the adapted source's own predictions in the teacher, see `jcrosslora.refine.reader.teach`.
        strength: of the source's change in the teacher, on top of that.
        prompt_weight: of the predictions inside a prompt, where those inside an answer have 1.
        dialogues: prompts with answers in all, those held out included.
        held_out: share of the dialogues that no step is fitted on: they decide how long each step is.
        tokens: of an answer at most.
        temperature: of the answers.
        vocabulary: how many of the commonest shared tokens predictions are compared on, beside those of the dialogues.
    """

    steps: int = 4
    rank: int = 12
    roles: tuple[str, ...] = ATTENTION
    trust: float = 0.5
    strength: float = 0.25
    prompt_weight: float = 1.0
    dialogues: int = 360
    held_out: float = 0.1
    tokens: int = 12
    temperature: float = 1.0
    vocabulary: int = 6000
