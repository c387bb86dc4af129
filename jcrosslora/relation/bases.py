"""A pair of bases, and samples of their weights: a few rows, the same on every run, instead of whole files."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jcrosslora.architectures.blocks import EMBEDDING
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base import finite
from jcrosslora.utils.picking import evenly_spaced

_TOKENS, _MIN_COSINE = 512, 0.7  # sampled rows of the embeddings, and the cosine of a row and its copy, see `matching`

Both = tuple[np.ndarray, np.ndarray]  # of the source and of the target


@dataclass(frozen=True, eq=False)
class Bases:
    """The base that adapters come from, and the base that they go to."""

    source: BaseModel
    target: BaseModel

    def __iter__(self) -> Iterator[BaseModel]:
        return iter((self.source, self.target))

    def rows(self, name: str, ids: Both) -> Both:
        """Read rows of a matrix that both have, such as the embedding: float32 (n, columns) each; see `finite`."""
        what = "the embedding" if name == EMBEDDING else name
        src, tgt = (finite(base, what, base.rows(name, own)) for base, own in zip(self, ids, strict=True))
        return src, tgt

    def tensors(self, name_src: str, name_tgt: str) -> Both:
        """Read a tensor of each as float32; see `finite`."""
        names = zip(self, (name_src, name_tgt), strict=True)
        src, tgt = (finite(base, name, base.tensor(name)) for base, name in names)
        return src, tgt

    def release(self) -> None:
        """Free the memory of the weights that were read, see `BaseModel.release`."""
        for base in self:
            base.release()


def some_of(items: np.ndarray, wanted: int) -> np.ndarray:
    """Return at most `wanted` evenly spaced items, including both ends."""
    return items[evenly_spaced(len(items), wanted)]


def stored_rows(base: BaseModel, name: str, ids: np.ndarray) -> np.ndarray:
    """Read rows of a linear module as float32 (n, I); in a fused matrix, ids count from the module's first row."""
    module = base.modules[name]
    return base.rows(module.tensor, ids if module.rows is None else module.rows[0] + ids)


def modules_of(base: BaseModel, role: str, count: int) -> list[str]:
    """Return at most `count` modules of a role, in evenly spaced layers from first to last."""
    names = [name for name, module in base.modules.items() if module.role == role]
    return [names[index] for index in evenly_spaced(len(names), count)]


def module_rows(base: BaseModel, name: str, ids: np.ndarray) -> np.ndarray:
    """Read rows as `stored_rows` does, and check them, see `finite`."""
    return finite(base, name, stored_rows(base, name, ids))


def cosine_similarity(src: np.ndarray, tgt: np.ndarray) -> float:
    """Return the cosine of two matrices as vectors, in float64; 1 if both are zero, 0 if one is."""
    src, tgt = src.astype(np.float64), tgt.astype(np.float64)
    norms = float(np.linalg.norm(src)), float(np.linalg.norm(tgt))
    if not (norms[0] and norms[1]):
        return float(norms[0] == norms[1])
    return float(np.sum(src * tgt)) / (norms[0] * norms[1])


@dataclass(frozen=True)
class TokenNames:
    """The differences of two tokenizers on the ids of one embedding.

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
        """Whether the embeddings agree id by id, but most ids stand for other tokens: one tokenizer is wrong."""
        return 2 * self.differ > self.both

    @property
    def sentence(self) -> str:
        """The figures as a clause."""
        return (
            f"the embeddings agree id by id, but {self.differ:,} of {self.both:,} ids stand for other tokens in the "
            "two tokenizers"
        )


def compare_token_names(source: BaseModel, target: BaseModel) -> TokenNames | None:
    """Compare the tokens that the tokenizers of two bases have for the same ids.

    Returns None if a tokenizer cannot be read, all names agree, or the embeddings do not agree at the ids with other
    names, so that the ids are not the same tokens. Raises CheckpointError if a sampled row holds NaN or infinity.
    """
    if source.dims.hidden != target.dims.hidden:
        return None
    names_src, names_tgt = source.vocabulary().names, target.vocabulary().names
    both = names_src.keys() & names_tgt.keys()
    differ = sorted(index for index in both if names_src[index] != names_tgt[index])
    if not differ or not _rows_agree(Bases(source, target), np.array(differ)):
        return None
    known = set(names_tgt.values())
    return TokenNames(len(differ), len(both), any(names_src[index] in known for index in differ))


def _rows_agree(bases: Bases, ids: np.ndarray) -> bool:
    some = some_of(ids, _TOKENS)
    src, tgt = bases.rows(EMBEDDING, (some, some))
    sizes = np.linalg.norm(src, axis=1) * np.linalg.norm(tgt, axis=1)
    used = sizes > 0
    return bool(used.any()) and float(np.mean(np.sum(src * tgt, axis=1)[used] / sizes[used])) >= _MIN_COSINE
