"""The result of LoRA-Align: the maps that carry any adapter of one base to another, with their diagnostics."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import flax.struct

from jcrosslora.alignment.agreement import Agreement
from jcrosslora.checkpoint import BaseModel
from jcrosslora.evidence.records import Terms
from jcrosslora.lineage.pairing import Pair, Pairing


@dataclass(frozen=True, eq=False)
class BaseInfo:
    """What remains known of a base model after its weights were read.

    Attributes:
        name: as written into `base_model_name_or_path`.
        ref: the path or hub id that was opened.
        revision: the hub commit, or None.
        digest: "sha256:..." of the weight files; "" where they were not to be read for it.
        family: name of its family.
        shapes: (O, I) of every module, by name, in the order of the model.
        fused: matrices that hold several modules, see `BaseModel.fused`.
        heads: (query heads, key heads).
    """

    name: str
    ref: str
    revision: str | None
    digest: str
    family: str
    shapes: Mapping[str, tuple[int, int]]
    fused: Mapping[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)
    heads: tuple[int, int] | None = None


def describe_base(base: BaseModel, *, digest: bool = True) -> BaseInfo:
    """Take down what `BaseInfo` holds; reads the weight files once for their digest, if that is wanted."""
    return BaseInfo(
        name=base.name,
        ref=base.ref,
        revision=base.revision,
        digest=base.digest() if digest else "",
        family=base.family.name,
        shapes={name: module.shape for name, module in base.modules.items()},
        fused=base.fused,
        heads=(base.dims.heads, base.dims.kv_heads),
    )


@dataclass(frozen=True)
class AlignRecipe:
    """The settings that a transport was made with.

    Attributes:
        method: name of the method.
        rank: truncation rank asked for; each module uses at most its own short side.
        depth: name of the depth map, or the list as given.
        seed: of the random control.
        signs: how the joint signs of singular vectors were fixed: "vocabulary", "rule", or "not needed".
        shared_tokens: how many tokens the vocabularies share, 0 where they were not used.
        probes: what text both bases were run on, "none" for methods that look at weights alone.
        probe_text: the file that it was read from, if any.
        probe_count: how many texts the source base wrote, if it did.
        whitening: exponent of theseus' partial whitening, 0 for none.
        svd: which kernels the SVDs of both bases are from, with the number of matrices; "not needed" without any.
    """

    method: str
    rank: int
    depth: str
    seed: int
    signs: str
    shared_tokens: int
    probes: str
    probe_text: str | None = None
    probe_count: int | None = None
    whitening: float = 0.0
    svd: str = "not needed"


@flax.struct.dataclass
class TransportGroup:
    """The maps of L pairs of modules of the same shapes.

    Attributes:
        terms: pairs (P_out, P_in) of linear maps, with a leading axis L on every array.
        agreement: diagnostics, leading axis L.
        pairs: static, the L pairs in the order of the axis.
        kernels: static, what each matrix was decomposed by, see `jcrosslora.linalg.decompose`; the source's first.
    """

    terms: Terms
    agreement: Agreement
    pairs: tuple[Pair, ...] = flax.struct.field(pytree_node=False)
    kernels: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())


@flax.struct.dataclass
class Transport:
    """All maps from one base to another.

    Attributes:
        groups: one for each combination of shapes (large ones are split to bound memory).
        recipe: static, the settings.
        source: static, the base that adapters come from.
        target: static, the base that they go to.
        pairing: static, which module feeds which.
        warnings: static, one sentence each.
    """

    groups: tuple[TransportGroup, ...]
    recipe: AlignRecipe = flax.struct.field(pytree_node=False)
    source: BaseInfo = flax.struct.field(pytree_node=False)
    target: BaseInfo = flax.struct.field(pytree_node=False)
    pairing: Pairing = flax.struct.field(pytree_node=False)
    warnings: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
