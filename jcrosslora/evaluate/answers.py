"""The answers that a base and its adapters wrote, beside the right ones, and the figures computed from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jcrosslora.decoder import Written
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.answer_figures import chrf, equal_json, exact, installed, parse_json, rouge_l
from jcrosslora.evaluate.bootstrap import Interval, differences, intervals, lift_of
from jcrosslora.text import Completion

_OF_TEXTS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "json": equal_json,
    "chrf": chrf,
    "rouge_l": rouge_l,
}
# Only an answer that ends can be right as a whole: a reader does not know where to stop in another.
_ENDED_ONLY = ("exact", "json")
ANSWER_FIGURES = (*_OF_TEXTS, "ended", "nll_per_char")


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers to n examples under A models: the base first, then its adapters.

    Attributes:
        names: (A,) names of the models.
        examples: (n,) the prompts with their right answers.
        written: (A,) of (n,), what each model wrote behind the prompts.
        nll: float64 (A, n), -log p(right answer) in nats, the token that ends it included.
        max_new_tokens: tokens at which an answer was cut off.
    """

    names: tuple[str, ...]
    examples: tuple[Completion, ...]
    written: tuple[tuple[Written, ...], ...]
    nll: np.ndarray
    max_new_tokens: int
    _computed: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """(A,) of (n,): the written answers, without space around them."""
        return tuple(tuple(one.text.strip() for one in row) for row in self.written)

    @property
    def ended(self) -> np.ndarray:
        """Bool (A, n): whether the model ended its answer; else it was cut off."""
        return np.array([[one.ended for one in row] for row in self.written], bool)

    @property
    def references(self) -> tuple[tuple[str, ...], ...]:
        """(n,): the right answers to each example, the one in the conversation first."""
        return tuple(
            tuple(dict.fromkeys(text.strip() for text in (one.answer, *one.references))) for one in self.examples
        )

    @property
    def figures(self) -> tuple[str, ...]:
        """Name the figures that say something here.

        "json" is among them if every right answer is JSON, "chrf" and "rouge_l" if their libraries are installed.
        """
        json = all(parse_json(text) is not None for texts in self.references for text in texts)
        return tuple(one for one in ANSWER_FIGURES if installed(one) and (json or one != "json"))

    def by_example(self, figure: str) -> np.ndarray:
        """float64 (A, n): a figure of each example.

        - "exact": 1 if the answer ended and is one of the right ones, space around it not counted.
        - "json": 1 if the answer ended and is JSON of the same value as a right one.
        - "chrf": chrF against the nearest right answer, 0 to 100.
        - "rouge_l": F-measure of ROUGE-L against the nearest right answer, 0 to 1; for English.
        - "ended": 1 if the model ended its answer.
        - "nll_per_char": `nll` over the characters of the answer, in nats.

        Raises:
            UsageError: an unknown figure, or one whose library is not installed.
        """
        if figure not in ANSWER_FIGURES:
            msg = f"figure {figure!r} is not known; known: {', '.join(ANSWER_FIGURES)}"
            raise UsageError(msg)
        if figure not in self._computed:
            self._computed[figure] = self._compute(figure)
        return self._computed[figure]

    def bootstrap(self, figure: str, *, draws: int = 10_000, seed: int = 0) -> list[Interval]:
        """Compute the mean of a figure under each model with its 95% interval over resampled examples."""
        return intervals(self.by_example(figure), draws=draws, seed=seed)

    def differences(self, figure: str, *, draws: int = 10_000, seed: int = 0) -> list[Interval]:
        """Compute each model's figure minus the base's, with the 95% interval over the same resampled examples."""
        return differences(self.by_example(figure), draws=draws, seed=seed)

    def lift(self, figure: str, moved: int, trained: int, *, draws: int = 10_000, seed: int = 0) -> Interval:
        """Compute the share of a trained adapter's gain over the base that a moved one brings (see `lift_recovered`).

        The interval is over the same resampled examples in all three models.

        Args:
            figure: as in `by_example`.
            moved: place of the model with the moved adapter in `names`, 1 or more.
            trained: place of the one with the adapter trained on this base.
            draws: number of resamples.
            seed: of the resampling.

        Raises:
            UsageError: no such model, an unknown figure, or a gain of the trained adapter whose interval is not
                above 0.
        """
        return lift_of(self.by_example(figure), moved, trained, lower=figure == "nll_per_char", draws=draws, seed=seed)

    def _compute(self, figure: str) -> np.ndarray:
        if figure == "ended":
            return self.ended.astype(np.float64)
        if figure == "nll_per_char":
            return self.nll / [len(one.answer.strip()) for one in self.examples]
        of_text, references = _OF_TEXTS[figure], self.references
        found = np.array([[of_text(*pair) for pair in zip(row, references, strict=True)] for row in self.texts])
        return np.where(self.ended, found, 0.0) if figure in _ENDED_ONLY else found
