"""Measure how close the weights of two bases are, and whether their tokenizers agree, from a sample of rows.

The rows are evenly spaced and the same on every run, so that most of a file is never read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jcrosslora.architectures.names import EMBEDDING
from jcrosslora.checkpoint import ROLES, BaseModel
from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.errors import CheckpointError
from jcrosslora.relation.structure import Structure

# Independent weights have cosine 0 with a spread of 1 / sqrt(numbers): different layers of SmolLM2-135M and of
# Gemma-3-270M, 64 rows of each, stay below 0.05. Rounding these two models to 4 bits (Q4_0) moves a module by at most
# 0.14 of its norm and leaves a cosine of 0.99 or more. An independent change of relative size d leaves a cosine of
# 1 / sqrt(1 + d^2): 0.89 for d = 0.5, 0.8 for d = 0.75. The limits lie there, nearer to copies than to unrelated
# weights; the distance separates a copy from a scaled one.
_NEAR_COSINE, _NEAR_DISTANCE = 0.8, 0.75
_LAYERS, _ROWS = 4, 64  # sampled layers of each role, and rows of each module
_TOKENS, _MIN_COSINE = 512, 0.7  # sampled rows of the embeddings, and the cosine of a row and its copy, see `matching`


@dataclass(frozen=True)
class WeightSimilarity:
    """The similarity of corresponding weights, as means over the sampled modules.

    Attributes:
        cosine: of the sampled weights W_src and W_tgt of a module.
        distance: ||W_tgt - W_src||_F / ||W_src||_F.
    """

    cosine: float
    distance: float
    modules: int

    @property
    def near(self) -> bool:
        """Whether an update of one base can be used on the other unchanged."""
        return self.cosine > _NEAR_COSINE and self.distance < _NEAR_DISTANCE


def compare_weights(
    source: BaseModel, target: BaseModel, structure: Structure | None = None
) -> WeightSimilarity | None:
    """Compare 64 evenly spaced rows of each module, in four layers from first to last for every role.

    The sample is the same on every run, and only its rows are read and dequantised.

    `structure` says which parts correspond; without it modules of the same name are compared.

    Returns:
        The similarity. None if names or shapes of the modules differ, or, with a structure, if no sampled module has a
        counterpart.

    Raises:
        CheckpointError: a sampled weight cannot be read, or holds NaN or infinity.
    """
    if structure is None:
        shapes = [{name: module.shape for name, module in base.modules.items()} for base in (source, target)]
        if shapes[0] != shapes[1]:
            return None
        pairs = [_compare(_sample(source, name), _sample(target, name)) for name in _sampled_modules(source)]
    else:
        samples = (counterpart_rows(source, target, structure, name, _ROWS) for name in _sampled_modules(target))
        pairs = [_compare(*(rows[:, columns] for rows, columns in pair)) for pair in samples if pair is not None]
    if not pairs:
        return None
    for base in (source, target):
        base.release()
    cosine, distance = np.mean(pairs, axis=0)
    return WeightSimilarity(float(cosine), float(distance), len(pairs))


def cosine_similarity(src: np.ndarray, tgt: np.ndarray) -> float:
    """Return the cosine of two matrices as vectors, in float64; 1 if both are zero, 0 if one is."""
    src, tgt = src.astype(np.float64), tgt.astype(np.float64)
    norms = float(np.linalg.norm(src)), float(np.linalg.norm(tgt))
    if not (norms[0] and norms[1]):
        return float(norms[0] == norms[1])
    return float(np.sum(src * tgt)) / (norms[0] * norms[1])


def _sampled_modules(base: BaseModel) -> Iterator[str]:
    for role in ROLES:
        names = [name for name, module in base.modules.items() if module.role == role]
        yield from (names[index] for index in evenly_spaced(len(names), _LAYERS))


def _sample(base: BaseModel, name: str) -> np.ndarray:
    return module_rows(base, name, evenly_spaced(base.modules[name].shape[0], _ROWS))


def _compare(src: np.ndarray, tgt: np.ndarray) -> tuple[float, float]:
    """Return cosine and relative distance; a zero matrix is at distance 0 of another, and 1 of anything else."""
    src, tgt = src.astype(np.float64), tgt.astype(np.float64)
    norm = float(np.linalg.norm(src))
    distance = float(np.linalg.norm(tgt - src)) / norm if norm else float(tgt.any())
    return cosine_similarity(src, tgt), distance


Sample = tuple[np.ndarray, np.ndarray]


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """Return at most `wanted` different integers from 0 to count - 1, evenly spaced and with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def module_rows(base: BaseModel, name: str, ids: np.ndarray) -> np.ndarray:
    """Read rows of a linear module as float32 (n, I); in a fused matrix, ids count from the module's first row.

    Raises:
        CheckpointError: a row does not exist, or holds NaN or infinity.
    """
    module = base.modules[name]
    first = 0 if module.rows is None else module.rows[0]
    return check_finite(base, name, base.rows(module.tensor, first + ids))


def counterpart_rows(
    source: BaseModel, target: BaseModel, structure: Structure, name: str, count: int
) -> tuple[Sample, Sample] | None:
    """Read rows of a target module and the source rows that they correspond to.

    At most `count` rows are read, evenly spaced over the rows with a counterpart.

    Returns:
        For the source and for the target: float32 (n, I) whole rows and (m,) the columns that correspond. None if the
        module has no counterpart.

    Raises:
        CheckpointError: a row holds NaN or infinity.
    """
    module = target.modules[name]
    other = structure.counterpart(module)
    outputs, inputs = structure.outputs(module.layer, module.role), structure.inputs(module.layer, module.role)
    if other is None or other not in source.modules or outputs is None or inputs is None:
        return None
    rows, columns = np.flatnonzero(outputs >= 0), np.flatnonzero(inputs >= 0)
    if not (len(rows) and len(columns)):
        return None
    rows = rows[evenly_spaced(len(rows), count)]
    src = module_rows(source, other, outputs[rows])
    return (src, inputs[columns]), (module_rows(target, name, rows), columns)


def check_finite(base: BaseModel, name: str, array: np.ndarray) -> np.ndarray:
    """Return the array unchanged.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    if not np.isfinite(array).all():
        msg = f"{base.ref}: the weight of {name} holds NaN or infinity; the file is damaged, download it again"
        raise CheckpointError(msg)
    return array


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
    some = ids[evenly_spaced(len(ids), _TOKENS)]
    bases = source, target
    src, tgt = (check_finite(base, "the embedding", base.rows(EMBEDDING, some)) for base in bases)
    sizes = np.linalg.norm(src, axis=1) * np.linalg.norm(tgt, axis=1)
    used = sizes > 0
    return bool(used.any()) and float(np.mean(np.sum(src * tgt, axis=1)[used] / sizes[used])) >= _MIN_COSINE
