"""The evidence that an alignment gives to a method, and the maps that the method returns.

Shapes are given for one pair of modules; the alignment adds a leading axis and `jax.vmap`. O and I are the out and in
features of a module, H is the hidden size, R the truncation rank; src is the source and tgt the target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeVar

import flax.struct
import jax
import numpy as np

from jcrosslora.errors import MethodError
from jcrosslora.linalg import LinearMap, TruncatedSVD, dot
from jcrosslora.relation.pairing import Pair

T = TypeVar("T")


class EvidenceKind(StrEnum):
    """A kind of evidence from two bases; the value is its name in reports."""

    SINGULAR_VECTORS = "truncated SVDs of both bases"
    SHARED_VOCABULARY = "shared vocabulary (optional)"
    ACTIVATIONS = "activations of both bases on the same text"
    ACTIVATION_GRAMS = "second moments of these activations"
    CHANNEL_SCALES = "scales of channels"
    SELECTION = "a base that is made of parts of the other"
    RANDOM_KEY = "a seed"
    PROBE_TEXTS = "both bases run on text"
    COMPLETIONS = "completions that the source writes with its adapter"


# Kinds that need both bases run on text.
RUNNING = frozenset({EvidenceKind.ACTIVATIONS, EvidenceKind.PROBE_TEXTS, EvidenceKind.COMPLETIONS})
# Evidence that `Method.move` uses itself; `MapMethod.maps` never sees it.
USED_BY_MOVE = frozenset({EvidenceKind.PROBE_TEXTS, EvidenceKind.COMPLETIONS})

Terms = tuple[tuple[LinearMap, LinearMap], ...]


@flax.struct.dataclass
class Vocabulary:
    """Second moments of the two embedding tables over the V tokens that both bases have, centred.

    Attributes:
        cross: (H_src, H_tgt), E_src' E_tgt / V.
        gram_src: (H_src, H_src), E_src' E_src / V; `gram_tgt` is the same for the target.
        count: V.
    """

    cross: jax.Array
    gram_src: jax.Array
    gram_tgt: jax.Array
    count: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Side:
    """One module of one base.

    Attributes:
        weight: (O, I), float32.
        gain: (H,), the gain of the norm between the residual stream and the module: before a module that reads the
            stream, after a module that writes it; ones if there is no norm.
        svd: None if the method does not require it.
    """

    weight: jax.Array
    gain: jax.Array
    svd: TruncatedSVD | None


@flax.struct.dataclass
class Activations:
    """Sums over N positions where the tokens of both bases end at the same character of the same text.

    Attributes:
        inputs: (I_src, I_tgt), sum of x_src x_tgt' over the inputs of the module.
        outputs: (O_src, O_tgt), the same for its outputs.
        input_squares: (I_src,) and (I_tgt,), sums of the squares of each dimension of x_src and x_tgt.
        input_grams: (I_src, I_src) and (I_tgt, I_tgt), sums of x_src x_src' and x_tgt x_tgt'; None if the method does
            not require them. Squares and grams of the outputs have O instead of I.
    """

    inputs: Any
    outputs: Any
    input_squares: Any
    output_squares: Any
    input_grams: Any = None
    output_grams: Any = None


@flax.struct.dataclass
class Selection:
    """Indices of the source module's rows (O_tgt,) and columns (I_tgt,) that the target module has; -1 for none."""

    outputs: jax.Array
    inputs: jax.Array


@flax.struct.dataclass
class ChannelPair:
    """Scales of rows (O,) and columns (I,) that turn the source's weight into the target's; often all 1."""

    rows: jax.Array
    columns: jax.Array


@flax.struct.dataclass
class Evidence:
    """All evidence on one pair of modules that a method may use.

    Attributes:
        vocabulary: moments over the shared tokens, the same for all modules; None if they are not available, and for
            modules inside latent attention, which neither read nor write the residual stream.
        key: a PRNG key that depends on the seed and on the target module's name; None for methods that draw nothing.
        reads: static; whether the module reads the residual stream (q, k, v, gate, up). Otherwise its outputs go to the
            stream (o, down), or it is inside latent attention.
        rank: static; R, the inner width of low-rank maps.
        method: static; name of the method that uses the evidence, for errors.

    A method reads the evidence that it requires through the properties, which are never None.
    """

    src: Side
    tgt: Side
    vocabulary: Vocabulary | None
    activations: Activations | None
    key: jax.Array | None
    reads: bool = flax.struct.field(pytree_node=False)
    rank: int = flax.struct.field(pytree_node=False)
    selection: Selection | None = None
    channels: ChannelPair | None = None
    method: str = flax.struct.field(pytree_node=False, default="")

    @property
    def singular_vectors_src(self) -> TruncatedSVD:
        """Truncated SVD of the source module."""
        return self._asked_for(self.src.svd, EvidenceKind.SINGULAR_VECTORS)

    @property
    def singular_vectors_tgt(self) -> TruncatedSVD:
        """Truncated SVD of the target module."""
        return self._asked_for(self.tgt.svd, EvidenceKind.SINGULAR_VECTORS)

    @property
    def activation_moments(self) -> Activations:
        """Moments of both bases' activations."""
        return self._asked_for(self.activations, EvidenceKind.ACTIVATIONS)

    @property
    def activation_grams(self) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """Second moments of each base's inputs, and of its outputs; see `Activations`."""
        grams, kind = self.activation_moments, EvidenceKind.ACTIVATION_GRAMS
        return self._asked_for(grams.input_grams, kind), self._asked_for(grams.output_grams, kind)

    @property
    def random_key(self) -> jax.Array:
        """PRNG key of this pair of modules."""
        return self._asked_for(self.key, EvidenceKind.RANDOM_KEY)

    @property
    def selected_rows(self) -> Selection:
        """Rows and columns of the source module that the target module has."""
        return self._asked_for(self.selection, EvidenceKind.SELECTION)

    @property
    def channel_scales(self) -> ChannelPair:
        """Scales by which the source's weight becomes the target's, up to rounding."""
        return self._asked_for(self.channels, EvidenceKind.CHANNEL_SCALES)

    @cached_property
    def token_covariances(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Covariance (R, R) of the bases' singular vectors over the shared tokens, and the variances (R,) of each.

        The singular vectors (H, R) are on the residual stream's side, with the norm gain folded in. There must be
        shared tokens.
        """
        assert self.vocabulary is not None
        words, svds = self.vocabulary, (self.singular_vectors_src, self.singular_vectors_tgt)
        found = (svd.v if self.reads else svd.u for svd in svds)
        src, tgt = (side.gain[:, None] * own for side, own in zip((self.src, self.tgt), found, strict=True))
        sides = (src, words.gram_src), (tgt, words.gram_tgt)
        variance_src, variance_tgt = ((x * dot(gram, x)).sum(axis=0) for x, gram in sides)
        return dot(dot(src.T, words.cross), tgt), variance_src, variance_tgt

    def _asked_for(self, value: T | None, kind: EvidenceKind) -> T:
        if value is None:
            msg = f"method {self.method} reads {kind.value}, which it has not asked for; "
            raise MethodError(msg + f"add EvidenceKind.{kind.name} to its `requires`")
        return value


@flax.struct.dataclass
class Maps:
    """The maps of one pair of modules: dW_tgt = sum over terms of P_out dW_src P_in'.

    Attributes:
        vector_ratio: (), squared correlation over the shared vocabulary of singular vectors with equal index in both
            bases, relative to vectors with nearby indices; 1 is chance, NaN means not measured.
        activation_cosine: (), cosine between the mapped activations of the source and the target's activations, over
            inputs and outputs; NaN means not measured.
        part_cosine: (), cosine between the selected rows and columns of W_src and W_tgt; NaN means not measured.
    """

    terms: Terms
    vector_ratio: jax.Array = flax.struct.field(default_factory=lambda: np.float32(np.nan))
    activation_cosine: jax.Array = flax.struct.field(default_factory=lambda: np.float32(np.nan))
    part_cosine: jax.Array = flax.struct.field(default_factory=lambda: np.float32(np.nan))


def pairs_as_json(pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    """Return pairs of modules as JSON values, for cache keys."""
    return [(pair.target, pair.source, pair.role) for pair in pairs]


@dataclass(frozen=True, eq=False)
class ModuleStack:
    """L pairs of modules of equal shapes, with stacked weights.

    Attributes:
        size: L', which is L rounded up to a multiple of the device count; the surplus repeats the last module.
        kernels: the kernel that decomposed each matrix, all of the source first; filled in by the provider of SVDs.
    """

    pairs: tuple[Pair, ...]
    size: int
    kernels: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Return the names of the source's and the target's modules."""
        return [pair.source for pair in self.pairs], [pair.target for pair in self.pairs]

    def filled(self, rows: list[T]) -> list[T]:
        """Extend L rows to L' by repeating the last one."""
        return rows + rows[-1:] * (self.size - len(rows))


AddEvidence = Callable[[Evidence, ModuleStack], Evidence]
"""Adds one kind of evidence for a stack of modules."""
