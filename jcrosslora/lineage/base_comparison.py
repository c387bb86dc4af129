"""What two bases have to do with each other: the same, rounded, trained further, pruned, permuted, or unrelated."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.families import COMMON_KEYS
from jcrosslora.lineage import Compared, Part, compare_modules, compare_rest, find_structure, parts_of
from jcrosslora.lineage.equality import same_bytes, unequal_tensors
from jcrosslora.lineage.method_selection import Choice, choose_from
from jcrosslora.lineage.wording import change_phrases, change_words, structure_phrases, structure_words

# Configuration keys that say what the parts say, or how the file is stored.
_SIZES = frozenset(
    {
        "model_type",
        "architectures",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "quantization_config",
        "compression_config",
        "layer_types",
    }
)
_SHOWN = 3  # names of tensors in one sentence


@dataclass(frozen=True)
class BaseComparison:
    """What a target base is of a source base, with the evidence.

    Attributes:
        words: what holds, the first of which says most. Of the parts: "pruned" (the target lacks some of the
            source's), "extended" (it has others beside them), "upscaled" (it repeats some), "permuted" (it has them in
            another order). Of their weights: "same", "rounded" (to a narrower float format), "quantised" (to 8 bits or
            fewer), "LoRA-merged", "further trained", "further trained or quantised" (which of the two cannot be told),
            "scaled". Or "unrelated" alone.
        sentence: the same in words.
        parts: how many of each kind of part the two share; empty for unrelated bases.
        layers: the source layer of every target layer, None for none.
        compared: what was compared, tensor by tensor.
        notes: what else there is to know, one sentence each.
        choice: what `--method auto` would take for the pair, and why.
    """

    words: tuple[str, ...]
    sentence: str
    parts: tuple[Part, ...]
    layers: tuple[int | None, ...]
    compared: tuple[Compared, ...]
    notes: tuple[str, ...]
    choice: Choice

    def to_json(self) -> dict[str, Any]:
        """The relation as JSON values."""
        return asdict(self)


def compare_bases(source: BaseModel, target: BaseModel) -> BaseComparison:
    """Say from the weights alone what a target base is of a source base.

    A sample of rows is read, the same on every run; all rows only where the sample is equal throughout, because
    "same" is said of nothing less.

    Args:
        source: the base that adapters come from.
        target: the base that they go to.

    Returns:
        The relation.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    structure, reason = find_structure(source, target)
    modules = [] if structure is None else compare_modules(source, target, structure)
    choice = choose_from(source, target, structure, lambda _: modules)
    if structure is None:
        return BaseComparison(("unrelated",), f"the two bases are unrelated: {reason}", (), (), (), (), choice)
    parts = parts_of(structure, source, target)
    compared = [*modules, *compare_rest(source, target, structure)]
    words = [*structure_words(parts), *change_words(compared)]
    sentence = "; ".join([*structure_phrases(parts), *change_phrases(compared)])
    if not words:
        words, sentence = _settle_equal(source, target)
    notes = tuple(_notes(source, target, structure.by_embedding))
    layers = tuple(None if layer is None else layer.layer for layer in structure.layers)
    return BaseComparison(tuple(words), sentence, parts, layers, tuple(compared), notes, choice)


def _settle_equal(source: BaseModel, target: BaseModel) -> tuple[list[str], str]:
    """The words and the sentence for bases whose samples are equal, from all of their numbers."""
    if same_bytes(source, target):
        return ["same"], "the weight files are equal, byte by byte"
    unequal = unequal_tensors(source, target)
    if not unequal:
        return ["same"], "all numbers of all tensors are equal, though the files are not"
    more = f" and {len(unequal) - _SHOWN} more" if len(unequal) > _SHOWN else ""
    names = ", ".join(unequal[:_SHOWN]) + more
    return [
        "further trained"
    ], f"all sampled rows are equal, but some others are not, in {len(unequal)} tensors: {names}"


def _notes(source: BaseModel, target: BaseModel, by_embedding: bool) -> Iterator[str]:
    if source.family.name != target.family.name:
        yield f"the families differ: {source.family.name} and {target.family.name}"
    if not by_embedding:
        yield "the embeddings have nothing in common, token by token; the stream is taken to be in the same order"
    known = (COMMON_KEYS | source.family.keys | target.family.keys) - _SIZES
    differ = [key for key in sorted(known) if source.config.get(key) != target.config.get(key)]
    if differ:
        values = ", ".join(f"{key} {source.config.get(key)} > {target.config.get(key)}" for key in differ)
        yield f"the configurations differ: {values}"
