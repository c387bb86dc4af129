"""Compare the tokenizers of two bases by the ids at which their embeddings agree."""

from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.relation.weight_similarity import check_finite, evenly_spaced

_ROWS = 512  # of the embeddings that are read
_MIN_COSINE = 0.7  # of a row and its copy, see `matching`


@dataclass(frozen=True)
class TokenNames:
    """What two tokenizers call the ids of one embedding.

    Attributes:
        differ: number of ids that stand for other tokens.
        both: number of ids that both tokenizers list.
        moved: whether one of the tokens at these ids has another id in the target.
    """

    differ: int
    both: int
    moved: bool

    @property
    def contradict(self) -> bool:
        """Whether the embeddings agree id by id, but most ids stand for other tokens: one tokenizer is not its own."""
        return 2 * self.differ > self.both

    @property
    def sentence(self) -> str:
        """The figures as a clause."""
        return (
            f"the embeddings agree id by id, but {self.differ:,} of {self.both:,} ids stand for other tokens in the "
            "two tokenizers"
        )


def compare_token_names(source: BaseModel, target: BaseModel) -> TokenNames | None:
    """Compare what the tokenizers of two bases call the ids that both list.

    Returns:
        The comparison; None if a tokenizer cannot be read, all names agree, or the embeddings do not agree at the ids
        with other names, so that the ids are not the same tokens.

    Raises:
        CheckpointError: a sampled row holds NaN or infinity.
    """
    if source.dims.hidden != target.dims.hidden:
        return None
    names_src, names_tgt = _names(source.vocabulary()), _names(target.vocabulary())
    both = names_src.keys() & names_tgt.keys()
    differ = sorted(index for index in both if names_src[index] != names_tgt[index])
    if not differ or not _rows_agree(source, target, np.array(differ)):
        return None
    known = set(names_tgt.values())
    return TokenNames(len(differ), len(both), any(names_src[index] in known for index in differ))


def _names(vocabulary: Vocabulary) -> dict[int, bytes]:
    return {index: name for name, index in {**(vocabulary.tokens or {}), **vocabulary.special}.items()}


def _rows_agree(source: BaseModel, target: BaseModel, ids: np.ndarray) -> bool:
    some = ids[evenly_spaced(len(ids), _ROWS)]
    bases = source, target
    src, tgt = (check_finite(base, "the embedding", base.rows(base.embedding_name, some)) for base in bases)
    sizes = np.linalg.norm(src, axis=1) * np.linalg.norm(tgt, axis=1)
    used = sizes > 0
    return bool(used.any()) and float(np.mean(np.sum(src * tgt, axis=1)[used] / sizes[used])) >= _MIN_COSINE
