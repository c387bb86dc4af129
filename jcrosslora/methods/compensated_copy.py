"""Compensated copy: the unchanged update, plus what a quantiser's error does on text.

An adapter that was trained on a quantised base (QLoRA) works for the weights W_src + dW. A copy on the target lacks
E = W_src - W_tgt, to which the training had adapted. E is of full rank, but the inputs X (N, I) of a module are not:

    dW_tgt = dW + U U' E,   U (O, R) the leading left singular vectors of E X'

of all updates of rank R, U U' E is nearest to E on these inputs (Eckart and Young). The inputs are the source's.

Sources: low-rank reconstruction of quantisation errors, LQER (arXiv 2402.02446) and QERA (arXiv 2410.06040), which
repair a quantised base. Here it is the full base that is given the error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax

from jcrosslora.maps import EvidenceKind, Sizes, Task
from jcrosslora.methods.interpolated_copy import InterpolatedCopy
from jcrosslora.utils.cost import Cost


@dataclass(frozen=True)
class CompensatedCopy(InterpolatedCopy):
    """The unchanged update, plus the difference from the target's weights to the source's, as it acts on text."""

    name = "compensated-copy"
    summary = "the unchanged update, plus what the difference of the two bases does on text, at low rank"
    when = "for an adapter of a 4-bit base (QLoRA) and the full base"
    reference = "this package; LQER: arXiv 2402.02446"
    requires = frozenset({EvidenceKind.PROBE_TEXTS})
    held: ClassVar[str] = "what it does on the texts"

    interpolation: float = 1.0
    """Share of the difference that is added: 0 is a plain copy."""
    svd_rank: int = 32
    """Rank that is added to each module."""

    def cost(self, sizes: Sizes) -> dict[str, Cost | None]:
        """Count the source's pass over the texts, and the decompositions."""
        from jcrosslora.maps.activations import inputs_cost

        return {"collect inputs": inputs_cost(sizes.probes), **super().cost(sizes)}

    def inputs(self, task: Task) -> Callable[[str], jax.Array]:
        """Run the source over the texts."""
        from jcrosslora.maps.activations import input_rows

        return input_rows(task.base, task.batches)
