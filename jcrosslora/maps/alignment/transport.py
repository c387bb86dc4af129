"""The result of LoRA-Align: the maps that carry any adapter of one base to another, with their diagnostics."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base_info import BaseInfo
from jcrosslora.maps.alignment.agreement import Agreement
from jcrosslora.maps.evidence.records import Terms
from jcrosslora.maps.method import Method
from jcrosslora.relation.pairing import Pair, Pairing


@dataclass(frozen=True, eq=False)
class AlignRecipe:
    """The settings that a transport was made with, and what came of them.

    Attributes:
        method: name of the method, "module:Class" for one of a user's own.
        settings: its hyper-parameters.
        depth: name of the depth map, or the list as given.
        seed: of everything that is drawn.
        signs: how the joint signs of singular vectors were fixed: "vocabulary", "rule", or "not needed".
        shared_tokens: how many tokens the vocabularies share, 0 where they were not used.
        probes: the text that both bases were run on, "none" for methods that look at weights alone.
        probe_text: the file that it was read from, if any.
        probe_count: how many texts the source base wrote, if it did.
        svd: which kernels the SVDs of both bases are from, with the number of matrices; "not needed" without any.
    """

    method: str
    settings: Mapping[str, Any]
    depth: str
    seed: int
    signs: str
    shared_tokens: int
    probes: str
    probe_text: str | None = None
    probe_count: int | None = None
    svd: str = "not needed"


@flax.struct.dataclass
class TransportGroup:
    """The maps of L pairs of modules of the same shapes.

    Attributes:
        terms: pairs (P_out, P_in) of linear maps, with a leading axis L on every array.
        agreement: diagnostics, leading axis L.
        pairs: static, the L pairs in the order of the axis.
        kernels: static, what each matrix was decomposed by, the source's first; see `jcrosslora.linalg.decompose`.
    """

    terms: Terms
    agreement: Agreement
    pairs: tuple[Pair, ...] = flax.struct.field(pytree_node=False)
    kernels: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())


@flax.struct.dataclass
class Transport:
    """All maps from one base to another. A pytree: it may be an argument of a function that is compiled.

    Attributes:
        groups: one for each combination of shapes (large ones are split to bound memory).
        method: static, the method that made them.
        recipe: static, the settings and their outcome.
        source: static, the base that adapters come from.
        target: static, the base that they go to.
        pairing: static, which module feeds which.
        bases: static, both bases as they were opened, for what follows the maps; None where they are gone.
        warnings: static, one sentence each.
    """

    groups: tuple[TransportGroup, ...]
    method: Method = flax.struct.field(pytree_node=False)
    recipe: AlignRecipe = flax.struct.field(pytree_node=False)
    source: BaseInfo = flax.struct.field(pytree_node=False)
    target: BaseInfo = flax.struct.field(pytree_node=False)
    pairing: Pairing = flax.struct.field(pytree_node=False)
    bases: tuple[BaseModel, BaseModel] | None = flax.struct.field(pytree_node=False, default=None)
    warnings: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def __repr__(self) -> str:
        """One line: method, bases and sizes."""
        modules = sum(len(group.pairs) for group in self.groups)
        return f"Transport({self.method.name}, {self.source.name} -> {self.target.name}, {modules} modules)"

    def _repr_html_(self) -> str:
        """A table of the modules by role, for notebooks."""
        from jcrosslora.utils.texts import html_table

        counts = Counter(pair.role for group in self.groups for pair in group.pairs)
        rows = [{"module": role, "pairs": str(count)} for role, count in counts.items()]
        return html_table(rows, f"{self.method.name}: {self.source.name} to {self.target.name}")
