"""The result of LoRA-Align: maps that move any adapter of one base to the other, and how well the bases agree."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import flax.struct

from jcrosslora.checkpoint import BaseInfo, BaseModel
from jcrosslora.maps.groups import TransportGroup
from jcrosslora.maps.method import Method
from jcrosslora.relation.pairing import Pairing


@dataclasses.dataclass(frozen=True)
class AlignRecipe:
    """The settings that a transport was made with, and their outcome.

    Attributes:
        method: name of the method, "module:Class" for a user's method.
        signs: how the joint signs of singular vectors were fixed: "vocabulary", "rule", or "not needed".
        shared_tokens: number of tokens that the vocabularies share, 0 if they were not used.
        probes: description of the text that both bases were run on; "none" without text.
        prompts: the file with this text, if any.
        examples: the file with labelled examples, if any; `example_count` is their number.
        probe_count: number of texts that the source base wrote; None if it wrote none.
        svd: the kernels that computed the SVDs of both bases, with the number of matrices; "not needed" without SVDs.
    """

    method: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    depth: str = ""
    seed: int = 0
    signs: str = ""
    shared_tokens: int = 0
    probes: str = "none"
    prompts: str | None = None
    examples: str | None = None
    example_count: int = 0
    probe_count: int | None = None
    svd: str = "not needed"


@dataclasses.dataclass(frozen=True)
class OpenedBases:
    """Both opened bases. All instances compare equal, because a program depends only on their `BaseInfo`."""

    source: BaseModel = dataclasses.field(compare=False)
    target: BaseModel = dataclasses.field(compare=False)


@flax.struct.dataclass
class Transport:
    """All maps from one base to another. A pytree, so it can be an argument of a compiled function.

    Transports of one method between bases of equal digests share a compiled program.

    Attributes:
        groups: one for each combination of shapes (large ones are split to bound memory); the other fields are static.
        pairing: which module feeds which; None for a method that fits an update from zero.
        bases: both opened bases, for the steps after the maps; None if they are not kept.
    """

    groups: tuple[TransportGroup, ...]
    method: Method = flax.struct.field(pytree_node=False)
    recipe: AlignRecipe = flax.struct.field(pytree_node=False)
    source: BaseInfo = flax.struct.field(pytree_node=False)
    target: BaseInfo = flax.struct.field(pytree_node=False)
    pairing: Pairing | None = flax.struct.field(pytree_node=False)
    bases: OpenedBases | None = flax.struct.field(pytree_node=False, default=None)
    warnings: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def __repr__(self) -> str:
        """Return one line: method, bases and number of modules."""
        modules = sum(len(group.pairs) for group in self.groups)
        return f"Transport({self.method.name}, {self.source.name} -> {self.target.name}, {modules} modules)"

    def _repr_html_(self) -> str:
        """Return a table of the modules by role, for notebooks."""
        from jcrosslora.utils.texts import html_table

        counts = Counter(pair.role for group in self.groups for pair in group.pairs)
        rows = [{"module": role, "pairs": str(count)} for role, count in counts.items()]
        return html_table(rows, f"{self.method.name}: {self.source.name} to {self.target.name}")
