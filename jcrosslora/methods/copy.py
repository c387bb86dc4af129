"""Methods that keep the source's rows and columns: unchanged, cut or padded, selected, interpolated, or compensated.

If W_tgt = S_out W_src S_in' with S_out and S_in selecting rows, as for a pruned, permuted or layer-repeated target, the
same selection applied to the adapted source gives dW_tgt = S_out dW_src S_in', exactly (`Select`). `PadTruncate` is
a baseline from a public repository that uses the models of the Cross-LoRA paper.

Interpolated copy adds the unchanged update to weights between the two bases. Further training turned the source's
weights into W_tgt = W_src + T. A copied update dW gives W_src + T + dW, which applies what T and dW have in common
twice: the more similar the two trainings are, the more it overshoots. So the adapter also subtracts a share of T, and
the weights become W_src + (1 - share) T + dW.

Compensated copy restores the quantisation error that the adapter was trained with. An adapter of a quantised base
(QLoRA) was trained for the weights W_src + dW, so a copy on the target lacks E = W_src - W_tgt. E has full rank, but
the inputs X (N, I) of a module do not:

    dW_tgt = dW + U U' E,   U (O, R) the leading left singular vectors of E X'

Of all updates of rank R, U U' E is nearest to E on these inputs (Eckart and Young). The inputs are the source's. If a
quantiser changed the scales of channels, W_src, dW and X come from the rescaled source, see `relation.channels`.

Sources: interpolation of the weights of a model and its fine-tuned version (WiSE-FT, arXiv 2109.01903); negated plan
vectors (arXiv 2212.04089); low-rank reconstruction of quantisation errors, LQER (arXiv 2402.02446) and QERA (arXiv
2410.06040), which repair a quantised base. This package combines them with a copied adapter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, Carried, LoRAFactors, fuse, split_fused
from jcrosslora.adapter.combining import add_factors
from jcrosslora.adapter.difference import module_differences
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import UsageError
from jcrosslora.linalg import LinearMap, cosine, select
from jcrosslora.maps import Evidence, EvidenceKind, MapMethod, Maps, Moved, Plan
from jcrosslora.relation import find_channel_scales
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import track

# The rank of each module is the lowest that holds this share of ||T||_F^2, up to the rank that was set.
ENERGY = 0.99


@dataclass(frozen=True)
class PadTruncate(MapMethod):
    """Rows and columns cut off or filled with zeros."""

    name = "pad-truncate"
    summary = "rows and columns cut off or filled with zeros"
    when = "as a baseline"
    reference = "github.com/ootyzzz/PAW, lora_x_core.py"
    measure = "weight cosine"

    def maps(self, evidence: Evidence) -> Maps:
        """Return rectangular identities, which cut off surplus rows and columns or fill missing ones with zeros."""
        (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
        return Maps(((_padded(o_src, o_tgt), _padded(i_src, i_tgt)),))


@dataclass(frozen=True)
class Copy(MapMethod):
    """The unchanged update, or with the scales of channels that AWQ and SmoothQuant leave in a copy of its base."""

    name = "copy"
    summary = "the unchanged update"
    when = "for a base and its 8-bit or fp8 copy"
    reference = "On the Importance of Trivial Baselines (OpenReview vt77NBTZhH)"
    requires = frozenset({EvidenceKind.CHANNEL_SCALES})
    measure = "weight cosine"
    equal_shapes = True
    carries = Carried.LINEAR | Carried.TOKENS | Carried.EXPERTS

    def maps(self, evidence: Evidence) -> Maps:
        """Return the scales of rows and columns that turn the source's weight into the target's; usually all 1."""
        scales = evidence.channel_scales
        p_out, p_in = (select(jnp.arange(len(one)), one, len(one)) for one in (scales.rows, scales.columns))
        return Maps(((p_out, p_in),))


@dataclass(frozen=True)
class Select(MapMethod):
    """Rows, columns and layers of the source that the target consists of."""

    name = "select"
    summary = "rows, columns and layers of the source that the target consists of, in its order"
    when = "for a base and a model cut from it"
    reference = "this package"
    requires = frozenset({EvidenceKind.SELECTION})
    measure = "part cosine"
    carries = Carried.LINEAR | Carried.TOKENS | Carried.EXPERTS

    def maps(self, evidence: Evidence) -> Maps:
        """Return maps that select the rows of the evidence; rows without a counterpart become zero."""
        chosen = evidence.selected_rows
        o_src, i_src = evidence.src.weight.shape
        p_out, p_in = _choice(chosen.outputs, o_src), _choice(chosen.inputs, i_src)
        carried = p_in(p_out(evidence.src.weight).T).T
        return Maps(((p_out, p_in),), part_cosine=cosine(carried, evidence.tgt.weight))


def _choice(index: jax.Array, size: int) -> LinearMap:
    return select(jnp.maximum(index, 0), (index >= 0).astype(jnp.float32), size)


def _padded(size_src: int, size_tgt: int) -> LinearMap:
    index = jnp.arange(size_tgt)
    return select(jnp.minimum(index, size_src - 1), (index < size_src).astype(jnp.float32), size_src)


@dataclass(frozen=True)
class InterpolatedCopy(Copy):
    """The unchanged update, plus a share of the difference from the target's weights to the source's."""

    name = "interpolated-copy"
    summary = "the unchanged update, on weights interpolated from the target towards the source"
    when = "for a base and its further-trained version"
    reference = "this package; interpolation of weights: arXiv 2109.01903"
    equal_modules = True

    held: ClassVar[str] = (
        "the difference; while the adapter is on, the target gives up {} of what they hold of its further training"
    )

    interpolation: float = 0.75
    """How far the weights go from the target towards the source: 0 is a plain copy, 1 the weights of the source."""
    svd_rank: int = 8
    """Truncation rank of the difference. Its first directions hold what the two trainings have in common; a higher
    rank removes more of the target's own training."""

    def check(self) -> None:
        """Raise UsageError for a share that is below 0, above 1 or NaN."""
        if not 0 <= self.interpolation <= 1:
            msg = f"interpolation {self.interpolation:g} is out of range; it must be from 0 (a copy) to 1 (the weights "
            raise UsageError(msg + "of the source)")

    def cost(self, plan: Plan) -> dict[str, Cost | None]:
        """Count a decomposition of each target module."""
        shapes = [module.shape for module in plan.target.modules.values()]
        return {"interpolate": Cost(decomposed=tuple((shape, min(plan.rank, *shape), False) for shape in shapes))}

    def move(self, plan: Plan) -> Moved:
        """Add the low-rank difference, which is computed once for all adapters of a pair."""
        moved, key = super().move(plan), (self, *plan.batches)
        if key not in plan.shared:
            share, inputs = self.interpolation, self.inputs(plan)
            plan.shared[key] = interpolate_to_source(
                plan.pair.source, plan.target, share, rank=plan.rank, inputs=inputs
            )
        modules, kept = plan.shared[key]
        added = _sum(plan.target, moved.adapter, modules)
        return replace(moved, adapter=added, added=self.sentence(modules, kept))

    def sentence(self, modules: Mapping[str, LoRAFactors], kept: float) -> str:
        """Describe what is added, without a full stop."""
        share = f"{self.interpolation:.0%}"
        if not modules:
            reason = "the two bases have the same weights in all modules"
            reason = reason if self.interpolation else "an interpolation of 0 was asked for"
            return f"nothing is added to the copy: {reason}"
        highest = max(factors.rank for factors in modules.values())
        return (
            f"{share} of the difference from the target's weights to the source's is added to the copy, in "
            f"{len(modules)} modules and ranks up to {highest}, which hold {kept:.1%} of "
            f"{self.held.format(share)}"
        )

    def inputs(self, plan: Plan) -> Callable[[str], jax.Array] | None:
        """Return a function from a module's name to inputs (N, I) that guide its truncation; None for a plain SVD."""
        del plan
        return None


@dataclass(frozen=True)
class CompensatedCopy(InterpolatedCopy):
    """The unchanged update, plus the difference from the target's weights to the source's, as it acts on text."""

    name = "compensated-copy"
    summary = "the unchanged update, plus what the difference of the two bases does on text, at low rank"
    when = "for an adapter of a 4-bit base (QLoRA) and the full base"
    reference = "this package; LQER: arXiv 2402.02446"
    requires = Copy.requires | {EvidenceKind.PROBE_TEXTS}
    held: ClassVar[str] = "what it does on the texts"

    interpolation: float = 1.0
    """Share of the difference that is added: 0 is a plain copy."""
    svd_rank: int = 32
    """Rank that is added to each module."""

    def cost(self, plan: Plan) -> dict[str, Cost | None]:
        """Count the source's pass over the texts, and the decompositions."""
        from jcrosslora.maps.activations import inputs_cost

        return {"collect inputs": inputs_cost(plan.text_count), **super().cost(plan)}

    def inputs(self, plan: Plan) -> Callable[[str], jax.Array]:
        """Run the source over the texts, and return a function from a module's name to its inputs (N, I)."""
        from jcrosslora.maps.activations import input_rows

        return input_rows(plan.pair.source, plan.batches)


def interpolate_to_source(
    source: BaseModel,
    target: BaseModel,
    share: float,
    *,
    rank: int,
    inputs: Callable[[str], jax.Array] | None = None,
) -> tuple[dict[str, LoRAFactors], float]:
    """Compute a share of the difference between the weights of the two bases, as a low-rank update of the target.

    Each difference is truncated to the lowest rank that holds 99 % of its energy, and to `rank` at most. If the bases
    differ by a merged LoRA, that is the LoRA's rank; if all weights were trained, no small rank may hold it. With
    `inputs` each is truncated to `rank` by its effect on the inputs (N, I) of its module.

    The share goes from 0 (target) to 1 (source). W_src and the inputs have the scales of the target's channels, see
    `relation.channels`. Both bases must have the same modules.

    Returns share * (W_src - W_tgt) of each module, truncated, without modules of equal weights; and the part of the
    total energy that the ranks hold, 1 if nothing differs. The energy is ||W_src - W_tgt||_F^2, or with `inputs` that
    of the outputs. Raises CheckpointError if a weight cannot be read or is not finite.
    """
    shapes = {name: module.shape for name, module in target.modules.items()}
    modules: dict[str, LoRAFactors] = {}
    whole = left = 0.0
    with track(len(target.modules), "interpolate", "modules") as bar:
        scales = find_channel_scales(source, target)
        rescaled = None if scales is None else lambda name: scales.of(name, shapes[name])
        for name, found in module_differences(source, target, shapes, lambda _: rank, inputs, scales=rescaled):
            cut = found.cut(found.lowest_rank(ENERGY)) if inputs is None else found
            whole, left = whole + found.energy, left + found.energy * cut.kept
            if len(cut.s) and share:
                modules[name] = LoRAFactors(a=cut.factors.a, b=cut.factors.b * np.float32(share))
            bar.update()
    return {name: modules[name] for name in target.modules if name in modules}, left / whole if whole else 1.0


def _sum(target: BaseModel, mapped: Adapter, added: Mapping[str, LoRAFactors]) -> Adapter:
    # Add fused matrices as a whole, so that their parts go on sharing A; added separately, each part would copy A.
    terms = [fuse(part, target.fused) for part in (mapped.modules, added)]
    whole = {name: add_factors(name, [part[name] for part in terms if name in part]) for name in terms[0] | terms[1]}
    parts = split_fused(Adapter(whole), target.fused).modules
    modules = {name: parts[name] for name in target.modules if name in mapped.modules or name in added}
    return replace(mapped, modules=modules)
