"""Compare two bases: equal, rounded, quantised, trained further, pruned, permuted, or unrelated.

Bases that look equal in a sample are read whole, because no sample can show that all numbers are the same.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.architectures.blocks import EMBEDDING, HEAD
from jcrosslora.architectures.config import COMMON_KEYS
from jcrosslora.checkpoint import BaseModel, expert_tensors, open_base
from jcrosslora.relation.bases import Bases, compare_token_names, stored_rows
from jcrosslora.relation.channels import has_other_gains
from jcrosslora.relation.matching import MATRICES
from jcrosslora.relation.method_selection import MethodChoice, choose_method, equal_files
from jcrosslora.relation.relation import (
    RelationFlag,
    TensorComparison,
    compare_modules,
    compare_other_tensors,
    relation_of,
)
from jcrosslora.relation.structure import Part, Structure, count_parts
from jcrosslora.relation.structure_search import find_structure
from jcrosslora.relation.wording import OTHER_GAINS, change_phrases, structure_phrases, unequal_phrase

# Configuration keys whose values the parts show, or that say how the file is stored.
_COVERED_KEYS = frozenset(
    {
        *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "vocab_size", "quantization_config", "compression_config"),
        *("layer_types", "mlp_layer_types"),
    }
)
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class BaseComparison:
    """The relation of a target base to a source base, with the evidence.

    Attributes:
        words: the relation, most important word first, as strings such as "pruned" or "further trained";
            docs/comparing-bases.md says how each is recognised.
        sentence: the relation as a sentence, with figures.
        parts: how many parts of each kind the two share; empty for unrelated bases.
        layers: the source layer of every target layer, None for none.
        compared: the comparison of each tensor.
        notes: further remarks, one sentence each.
        choice: the method that `auto` stands for on the pair, and why.
    """

    words: tuple[RelationFlag, ...]
    sentence: str
    parts: tuple[Part, ...]
    layers: tuple[int | None, ...]
    compared: tuple[TensorComparison, ...]
    notes: tuple[str, ...]
    choice: MethodChoice

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return asdict(self)


def compare_bases(source: BaseModel | str | Path | Any, target: BaseModel | str | Path | Any) -> BaseComparison:
    """Compare two bases, opened, or what `open_base` opens, by their weights alone.

    Reads a sample of rows, the same on every run. If the whole sample is equal, all rows are read, because "same"
    claims that all are equal.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    source, target = open_base(source), open_base(target)
    bases = Bases(source, target)
    sides = zip(("source", "target"), bases, strict=True)
    notes = [f"{side} base: {note}" for side, base in sides for note in base.notes]
    structure, reason = find_structure(source, target)
    modules = [] if structure is None else compare_modules(structure)
    choice = choose_method(source, target, (structure, reason), modules)
    if structure is None:
        sentence = f"the two bases are unrelated: {reason}"
        return BaseComparison((RelationFlag.UNRELATED,), sentence, (), (), (), tuple(notes), choice)
    parts = count_parts(structure)
    compared = [*modules, *compare_other_tensors(structure)]
    relation = relation_of(parts, compared)
    sentence = "; ".join([*structure_phrases(parts), *change_phrases(compared)])
    if not relation:
        same, sentence = _compare_fully(bases)
        relation.add(same)
    names = compare_token_names(source, target)
    if names is not None and (names.moved or names.contradict):
        relation = (relation - {RelationFlag.SAME}) | {RelationFlag.OTHER_TOKENIZER}
        sentence += f"; {names.sentence}"
    notes += _notes(structure)
    layers = tuple(None if layer is None else layer.layer for layer in structure.layers)
    words = tuple(item for item in RelationFlag if item in relation)
    return BaseComparison(words, sentence, parts, layers, tuple(compared), tuple(notes), choice)


def _notes(structure: Structure) -> Iterator[str]:
    source, target = structure.bases
    if source.family.name != target.family.name:
        yield f"the families differ: {source.family.name} and {target.family.name}"
    if has_other_gains(source, target, structure.scales):
        yield OTHER_GAINS
    if not structure.by_embedding:
        yield "no tokens of the embeddings agree; the residual streams are assumed to be in the same order"
    known = (COMMON_KEYS | source.family.known_keys | target.family.known_keys) - _COVERED_KEYS
    differ = [key for key in sorted(known) if source.config.get(key) != target.config.get(key)]
    if differ:
        values = ", ".join(f"{key} {source.config.get(key)} to {target.config.get(key)}" for key in differ)
        yield f"the configurations differ: {values}"


def _compare_fully(bases: Bases) -> tuple[RelationFlag, str]:
    """Return the relation and the sentence for bases with equal samples, from all of their numbers."""
    if equal_files(*bases):
        return RelationFlag.SAME, "the weight files are equal, byte by byte"
    unequal = _unequal_tensors(bases)
    if not unequal:
        return RelationFlag.SAME, "all numbers of all tensors are equal, though the files are not"
    return RelationFlag.TRAINED, unequal_phrase(unequal)


def _unequal_tensors(bases: Bases) -> list[str]:
    """Read all rows of two bases of one layout and return the names of the tensors that differ.

    Tensors that the model does not use, such as the rotary frequencies in older files, are ignored.
    """
    in_modules = {module.tensor for base in bases for module in base.modules.values()}
    in_modules |= {name for base in bases for layer in base.layers_with("router") for name in base.experts.names(layer)}
    names_src, names_tgt = (set(base.tensor_shapes()) for base in bases)
    shared = (names_src | {HEAD}) & (names_tgt | {HEAD})  # A tied head can be read although it is not stored.
    others = sorted((names_src | names_tgt) - in_modules)
    found = [name for name in others if name not in shared or not _equal(bases, name)]
    for name, module in bases.target.modules.items():
        batches = _batches(module.shape[0])
        if not all(_same(stored_rows(base, name, ids) for base in bases) for ids in batches):
            found.append(name)
        bases.release()
    for layer in bases.target.layers_with("router"):
        found += [f"{name} of the experts of layer {layer}" for name in _unequal_experts(bases, layer)]
        bases.release()
    return found


def _unequal_experts(bases: Bases, layer: int) -> Iterator[str]:
    """Yield the names of `expert_tensors` that differ in a layer, in any storage layout."""
    target = bases.target
    for name in expert_tensors(target.experts.rules):
        if name not in MATRICES:
            if not _same(base.experts.tensor(layer, name).astype(np.float32) for base in bases):
                yield name
            continue
        shape = target.experts.shape(name)
        every = itertools.product(range(shape[0]), _batches(shape[target.experts.axis(name)]))
        if not all(_same(base.experts.rows(layer, name, *part) for base in bases) for part in every):
            yield name


def _equal(bases: Bases, name: str) -> bool:
    shape, other = (tuple(base.store.shape(EMBEDDING if name == HEAD and base.tied else name)) for base in bases)
    if shape != other:  # such as embeddings of different vocabularies
        return False
    if len(shape) != 2:
        return _same(base.tensor(name).astype(np.float32) for base in bases)
    return all(_same(base.rows(name, ids) for base in bases) for ids in _batches(shape[0]))


def _same(arrays: Iterable[np.ndarray]) -> bool:
    src, tgt = arrays
    return np.array_equal(src, tgt)


def _batches(rows: int) -> Iterator[np.ndarray]:
    for start in range(0, rows, _ROWS_AT_ONCE):
        yield np.arange(start, min(start + _ROWS_AT_ONCE, rows))
