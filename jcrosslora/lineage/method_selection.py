"""Which method suits a pair of bases: whether one is a near copy of the other is read off a sample of their weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint import ROLES, BaseModel
from jcrosslora.checkpoint.quantised.registry import settings_of as quantisation_of
from jcrosslora.errors import CheckpointError
from jcrosslora.lineage import Compared, Structure, compare_modules, find_structure, parts_of
from jcrosslora.lineage.sampling import even, module_rows
from jcrosslora.lineage.wording import change_words

# The method for bases that differ, where both can be run on text; and the one where they cannot.
ACTIVATION_METHOD = "distill"
WEIGHT_METHOD = "cross-lora"
# The methods for near copies: those that differ by rounding at most, and those that were trained further.
COPY_METHOD, TRAINED_METHOD = "copy", "interpolated-copy"
_TRAINED = frozenset({"further trained", "LoRA-merged"})

# Independent weights have cosine 0 with a spread of 1 / sqrt(numbers): different layers of SmolLM2-135M and of
# Gemma-3-270M, 64 rows of each, stay below 0.05. Rounding these two models to 4 bits (Q4_0) moves a module by 0.14 of
# its norm at most and leaves a cosine of 0.99 or more. A change of relative size d that has nothing to do with the
# weights themselves leaves 1 / sqrt(1 + d^2): 0.89 for half of the norm, 0.8 for three quarters. The limits are put
# there, nearer to the copies than to strangers; the second one tells a copy from a multiple.
NEAR_COSINE, NEAR_DISTANCE = 0.8, 0.75

_LAYERS, _ROWS = 4, 64  # of each role, and of each module


@dataclass(frozen=True)
class WeightSimilarity:
    """How near the weights of two bases of equal shapes are, as means over the sampled modules.

    Attributes:
        cosine: of the sampled weights W_src and W_tgt of a module.
        distance: ||W_tgt - W_src||_F / ||W_src||_F.
        modules: how many were sampled.
    """

    cosine: float
    distance: float
    modules: int

    @property
    def near(self) -> bool:
        """Whether an update of one base can be used on the other as it is."""
        return self.cosine > NEAR_COSINE and self.distance < NEAR_DISTANCE


@dataclass(frozen=True)
class Choice:
    """What `--method auto` stands for on a pair of bases.

    Attributes:
        method: a name of `METHODS`.
        reason: one sentence without a full stop, for the report.
        found: its first part, what the bases were found to be.
    """

    method: str
    reason: str
    found: str


def by_maps(choice: Choice) -> Choice:
    """What `auto` stands for where the adapter acts only after certain tokens (aLoRA): no base is run with such a one.

    Args:
        choice: for any other adapter of the pair.
    """
    if choice.method != ACTIVATION_METHOD:
        return choice
    # Of the maps between unlike bases theseus, which runs the bases alone, lowered the target's scores on ARC-Easy
    # (-0.72 and -0.38 of the lift, README); cross-lora has no effect there, and says so.
    rest = ", but no base can be run with an adapter that acts only after its invocation tokens, so only weights are "
    return _choice(WEIGHT_METHOD, choice.found, f"{rest}compared")


def choose_method(source: BaseModel, target: BaseModel, found: tuple[Structure | None, str] | None = None) -> Choice:
    """Choose the method for a pair of bases from their weights and files; neither is run.

    Near-identical bases get `copy`, or, where one was surely trained further, `interpolated-copy`; those of which one
    is made of the other's parts (pruned, permuted, with repeated layers) `select`; others a method that runs both on
    text if the decoder supports both and both tokenizers can be read, else `cross-lora`.

    Args:
        source: the base that adapters come from.
        target: the base that they go to.
        found: what `jcrosslora.lineage.find_structure` found, if it has been asked.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    structure = (found or find_structure(source, target))[0]
    return choose_from(source, target, structure, lambda found: compare_modules(source, target, found))


def choose_from(
    source: BaseModel,
    target: BaseModel,
    structure: Structure | None,
    compared: Callable[[Structure], Sequence[Compared]],
) -> Choice:
    """As `choose_method`, from what is known of the bases already.

    Args:
        source: the base that adapters come from.
        target: the base that they go to.
        structure: what `jcrosslora.lineage.find_structure` found.
        compared: gives what `jcrosslora.lineage.compare_modules` finds; asked only where it decides.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    if structure is not None and not structure.in_place(source):
        similarity = compare_weights(source, target, structure)
        nested = all(part.nested for part in parts_of(structure, source, target) if part.name != "tokens")
        if similarity is not None and similarity.near and nested:
            made = f"one of the two bases is made of the other's parts ({_figures(similarity)})"
            return _choice("select", made, ", so the update is carried over part by part")
    similarity = compare_weights(source, target)
    if similarity is not None and similarity.near:
        same = f"the two bases are nearly identical ({_figures(similarity)})"
        words = [] if structure is None else change_words(compared(structure))
        trained = next((word for word in words if word in _TRAINED), None)
        if trained is None:
            return _choice(COPY_METHOD, same, ", so the update stays as it is")
        if trained == "further trained" and "quantised" in words and any(map(_states_quantisation, (source, target))):
            rest = ", and its quantiser may have left what looks like further training, so the update stays as it is"
            return _choice(COPY_METHOD, same, rest)
        same += f", but one is the other {trained}"
        return _choice(TRAINED_METHOD, same, ", so part of the source interpolation goes with the update")
    differ = "the modules of the two bases have different shapes" if similarity is None else _differ(similarity)
    obstacle = why_not_run(source, target)
    if obstacle is None:
        rest = ", and both can be run on text, so an update is fitted to what they predict"
        return _choice(ACTIVATION_METHOD, differ, rest)
    rest = f", and not both can be run on text ({obstacle}), so only weights are compared"
    return _choice(WEIGHT_METHOD, differ, rest)


def _states_quantisation(base: BaseModel) -> bool:
    """Whether a base was written by a quantiser, such as GPTQ, that may round to another than the nearest level."""
    return bool(quantisation_of(base.config))


def _choice(method: str, found: str, rest: str) -> Choice:
    return Choice(method, found + rest, found)


def compare_weights(
    source: BaseModel, target: BaseModel, structure: Structure | None = None
) -> WeightSimilarity | None:
    """Compare a sample of the weights: of every role four layers from first to last, of each module 64 even rows.

    The sample is the same on every run, and only its rows are read (and dequantised).

    Args:
        source: the base that adapters come from.
        target: the base that they go to.
        structure: which parts go together; None takes each for its namesake.

    Returns:
        The similarity, or None where the modules of the two bases are not the same by name and shape, or none has a
        counterpart in the structure.

    Raises:
        CheckpointError: a sampled weight cannot be read, or holds NaN or infinity.
    """
    if structure is None:
        shapes = [{name: module.shape for name, module in base.modules.items()} for base in (source, target)]
        if shapes[0] != shapes[1]:
            return None
        pairs = [_compare(_sample(source, name), _sample(target, name)) for name in _sampled_modules(source)]
    else:
        sampled = (_counterparts(source, target, structure, name) for name in _sampled_modules(target))
        pairs = [_compare(*pair) for pair in sampled if pair is not None]
    if not pairs:
        return None
    for base in (source, target):
        base.release()
    cosine, distance = np.mean(pairs, axis=0)
    return WeightSimilarity(float(cosine), float(distance), len(pairs))


def why_not_run(*bases: BaseModel) -> str | None:
    """Why the first base that cannot be run on text cannot: its decoder or its tokenizer; None if all can."""
    # Imported here: near copies need neither the decoder nor the tokenizers.
    from jcrosslora.checkpoint.tokenizer import load_tokenizer
    from jcrosslora.decoder import settings_of

    try:
        for base in bases:
            settings_of(base)
            load_tokenizer(base)
    except CheckpointError as error:
        return str(error)
    return None


def _sampled_modules(base: BaseModel) -> Iterator[str]:
    for role in ROLES:
        names = [name for name, module in base.modules.items() if module.role == role]
        yield from (names[place] for place in even(len(names), _LAYERS))


def _sample(base: BaseModel, name: str) -> np.ndarray:
    """float64 (n, I): rows of a module, evenly spread."""
    return module_rows(base, name, even(base.modules[name].shape[0], _ROWS)).astype(np.float64)


def _counterparts(
    source: BaseModel, target: BaseModel, structure: Structure, name: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """float64 (n, m) and (n, m): rows of a target module, and what they are in the source; None if they are nothing."""
    module = target.modules[name]
    other = structure.counterpart(module)
    if other is None:
        return None
    outputs, inputs = structure.outputs(module.layer, module.role), structure.inputs(module.layer, module.role)
    assert outputs is not None
    assert inputs is not None
    rows, columns = np.flatnonzero(outputs >= 0), np.flatnonzero(inputs >= 0)
    if not (len(rows) and len(columns)):
        return None
    rows = rows[even(len(rows), _ROWS)]
    src = module_rows(source, other, outputs[rows])[:, inputs[columns]]
    return src.astype(np.float64), module_rows(target, name, rows)[:, columns].astype(np.float64)


def _compare(src: np.ndarray, tgt: np.ndarray) -> tuple[float, float]:
    """Cosine and relative distance; a module of zeros is like another of zeros, and like nothing else."""
    norm_src, norm_tgt = float(np.linalg.norm(src)), float(np.linalg.norm(tgt))
    if norm_src == 0 or norm_tgt == 0:
        return (1.0, 0.0) if norm_src == norm_tgt else (0.0, 1.0)
    return float(np.sum(src * tgt)) / (norm_src * norm_tgt), float(np.linalg.norm(tgt - src)) / norm_src


def _figures(similarity: WeightSimilarity) -> str:
    figures = f"cosine {similarity.cosine:.3f}, relative distance {similarity.distance:.3f}"
    return f"{figures} of the weights of {similarity.modules} sampled modules"


def _differ(similarity: WeightSimilarity) -> str:
    return f"the weights of the two bases differ ({_figures(similarity)})"
