"""The methods by name. Each is a way to choose the pair of maps of every module; see `Method`."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from jcrosslora.errors import MethodError, suggestion
from jcrosslora.evidence.records import Evidence, Fit
from jcrosslora.methods import (
    coordinates,
    cross_lora,
    lora_x,
    lorasuite,
    prolora,
    random_map,
    scaled_procrustes,
    selected,
    theseus,
)

Then = Literal["nothing", "source interpolation", "residual", "predictions"]
Teacher = Literal["mean", "source"]
Measure = Literal[
    "vector ratio", "subspace similarity", "weight cosine", "activation cosine", "head cosine", "part cosine", "none"
]


@dataclass(frozen=True)
class Method:
    """A named way to choose P_out and P_in for a pair of modules.

    Attributes:
        name: as given to `--method`.
        summary: one line.
        reference: where it is published.
        fit: the unbatched maths, pure and traceable.
        equal_shapes: whether it is only defined for modules of equal shape.
        decomposes: whether it asks for the SVDs of both modules (lora-x uses the source's only to say how similar
            the two bases are).
        usual_rank: the truncation rank where none is asked for: the paper's. The source interpolation takes 8: its first
            directions hold what the trainings have in common; with more of them the target forgets more (README).
        vectors: whether single singular vectors matter, or only the subspace that they span.
        needs_sign_anchor: whether it uses the shared vocabulary.
        activations: whether it runs both bases on probe texts.
        embeddings: whether it maps the stream by the embeddings of shared tokens and matches attention heads.
        selects: whether it takes rows and columns of the source that the weights name (`jcrosslora.lineage`).
        draws: whether its maps are random.
        preserves_residual_basis: whether the residual stream of the target has the source's coordinates, or those of them that the
            method names, so that changes of the embedding and the output head move as well.
        keeps_norm: whether the update's norm is restored after the map (a control has to).
        then: what follows when the adapter has been moved: nothing, part of the source interpolation from the target's weights to
            the source's (`jcrosslora.fit.interpolation`), a fit of down_proj to the change of the residual stream
            (`jcrosslora.fit.residual`), or of v and o of attention to predictions (`jcrosslora.fit.distill`).
        teacher: what a fit to predictions is to: a mean of the target's own and the adapted source's, and on top of it
            a share of what the adapter changes; or the adapted source's alone.
        measure: which diagnostic says if the two bases agree in what this method relies on.
    """

    name: str
    summary: str
    reference: str
    fit: Callable[[Evidence], Fit]
    equal_shapes: bool = False
    decomposes: bool = False
    usual_rank: int = 320
    vectors: bool = False
    needs_sign_anchor: bool = False
    activations: bool = False
    embeddings: bool = False
    selects: bool = False
    draws: bool = False
    preserves_residual_basis: bool = False
    keeps_norm: bool = False
    then: Then = "nothing"
    teacher: Teacher = "mean"
    measure: Measure = "weight cosine"

    @property
    def cuts(self) -> bool:
        """Whether the truncation rank has any part in its maps."""
        return self.decomposes or self.draws

    @property
    def runs_bases(self) -> bool:
        """Whether both bases have to run on text."""
        return self.activations or self.fits

    @property
    def fits(self) -> bool:
        """Whether an update is fitted to what the source does with the adapter."""
        return self.then in ("residual", "predictions")

    @property
    def needs(self) -> str:
        """What the method looks at, in words."""
        parts = ["equal shapes"] if self.equal_shapes else []
        parts += ["a base made of the other's parts"] if self.selects else []
        parts += ["SVDs of both bases"] if self.decomposes else []
        parts += ["shared vocabulary (for the signs)"] if self.needs_sign_anchor else []
        parts += ["shared vocabulary (for the map)", "weights of all attention modules"] if self.embeddings else []
        parts += ["both bases run on text, their own or the user's"] if self.runs_bases else []
        return ", ".join(parts) or "nothing"


_METHODS = (
    Method(
        name="cross-lora",
        summary="i-th singular pair of the source to the i-th of the target: U_t D U_s' dW V_s D V_t'",
        reference="arXiv 2508.05232, Eq. 3-7",
        fit=cross_lora.fit,
        decomposes=True,
        vectors=True,
        needs_sign_anchor=True,
        measure="vector ratio",
    ),
    Method(
        name="lora-x",
        summary="keep what lies in the target's singular subspaces: U_t U_t' dW V_t V_t'",
        reference="arXiv 2501.16559, Eq. 3",
        fit=lora_x.fit,
        equal_shapes=True,
        decomposes=True,
        measure="subspace similarity",
    ),
    Method(
        name="prolora",
        summary="range and null space of source and target carried over separately; rank 2 K",
        reference="arXiv 2506.04244",
        fit=prolora.fit,
        equal_shapes=True,
        decomposes=True,
        measure="subspace similarity",
    ),
    Method(
        name="copy",
        summary="the update as it is",
        reference="On the Importance of Trivial Baselines (OpenReview vt77NBTZhH)",
        fit=coordinates.fit_padded,
        equal_shapes=True,
        preserves_residual_basis=True,
    ),
    Method(
        name="interpolated-copy",
        summary="the update as it is, on weights between both bases: part of the source interpolation to the source goes with it",
        reference="this package; interpolation of weights: arXiv 2109.01903",
        fit=coordinates.fit_padded,
        equal_shapes=True,
        usual_rank=8,
        preserves_residual_basis=True,
        then="source interpolation",
    ),
    Method(
        name="distilled-copy",
        summary="the update as it is, then v and o of attention fitted to what the adapted source predicts",
        reference="this package",
        fit=coordinates.fit_padded,
        equal_shapes=True,
        preserves_residual_basis=True,
        then="predictions",
        teacher="source",
    ),
    Method(
        name="select",
        summary="rows, columns and layers of the source that the target was made of, in its order",
        reference="this package",
        fit=selected.fit,
        selects=True,
        preserves_residual_basis=True,
        measure="part cosine",
    ),
    Method(
        name="pad-truncate",
        summary="rows and columns cut off or filled with zeros",
        reference="github.com/ootyzzz/PAW, lora_x_core.py",
        fit=coordinates.fit_padded,
    ),
    Method(
        name="index-interp",
        summary="rows and columns resampled at the nearest index",
        reference="github.com/ootyzzz/PAW, interpo_core.py",
        fit=coordinates.fit_resampled,
    ),
    Method(
        name="theseus",
        summary="orthogonal maps fitted on activations: polar(Y_t' Y_s) dW polar(X_s' X_t)",
        reference="arXiv 2602.12952",
        fit=theseus.fit,
        activations=True,
        measure="activation cosine",
    ),
    Method(
        name="scaled-procrustes",
        summary="theseus on activations whose dimensions have been brought to one size",
        reference="this package",
        fit=scaled_procrustes.fit,
        activations=True,
        measure="activation cosine",
    ),
    Method(
        name="residual-fit",
        summary="down_proj, layer by layer, so that the target's stream changes as the source's does",
        reference="this package",
        fit=coordinates.fit_nothing,
        then="residual",
        measure="none",
    ),
    Method(
        name="distill",
        summary="v and o of attention, in a few closed-form steps, to what the adapted source predicts",
        reference="this package",
        fit=coordinates.fit_nothing,
        then="predictions",
        measure="none",
    ),
    Method(
        name="lorasuite",
        summary="the stream by the embeddings of shared tokens, attention by matched heads; no fine-tuning",
        reference="arXiv 2505.13515",
        fit=lorasuite.fit,
        embeddings=True,
        measure="head cosine",
    ),
    Method(
        name="random",
        summary="control: random orthonormal bases, norm of the update kept",
        reference="control",
        fit=random_map.fit,
        draws=True,
        keeps_norm=True,
        measure="none",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _METHODS}


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        MethodError: there is none of that name.
    """
    check_known(name, METHODS)
    return METHODS[name]


def check_known(name: str, names: Collection[str]) -> None:
    """Refuse a method that is not among the names that can be given.

    Raises:
        MethodError: so it is.
    """
    if name not in names:
        msg = f"method {name!r} is unknown{suggestion(name, names)}; use one of {', '.join(names)}"
        raise MethodError(msg)
