"""What has to hold of the settings of an alignment before anything is computed."""

from collections.abc import Collection

from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import MethodError, PairingError, UsageError
from jcrosslora.lineage.pairing import Pair, Pairing
from jcrosslora.methods import Method

# At this exponent the activations of both bases have the same spread in all directions.
_MOST_WHITENING = 0.5


def wanted_pairs(pairing: Pairing, sources: Collection[str] | None) -> tuple[Pair, ...]:
    """The pairs that some source modules feed; all of them for None.

    Raises:
        PairingError: there are none.
    """
    if sources is None:
        return pairing.pairs
    pairs = tuple(pair for pair in pairing.pairs if pair.source in sources)
    if not pairs:
        msg = (
            f"none of the adapter's {len(sources)} modules feeds a module of the target under depth map "
            f"{pairing.depth_map!r}; choose another with --depth"
        )
        raise PairingError(msg)
    return pairs


def check_shapes(method: Method, source: BaseModel, target: BaseModel, pairs: tuple[Pair, ...]) -> None:
    """Check that a method that needs equal shapes has them.

    Raises:
        MethodError: it has not, for the pair that is named.
    """
    if not method.equal_shapes:
        return
    for pair in pairs:
        src, tgt = source.modules[pair.source].shape, target.modules[pair.target].shape
        if src != tgt:
            msg = (
                f"method {method.name} needs equal shapes, but {pair.source} is {src[0]} x {src[1]} and "
                f"{pair.target} is {tgt[0]} x {tgt[1]}; use cross-lora or another method that maps between widths"
            )
            raise MethodError(msg)


def check_rank(rank: int | None, method: Method, source: BaseModel, target: BaseModel, pairs: tuple[Pair, ...]) -> int:
    """The truncation rank to use, for None the method's usual one.

    Raises:
        UsageError: it is out of range.
    """
    widest = max(min(*source.modules[pair.source].shape, *target.modules[pair.target].shape) for pair in pairs)
    if rank is None:
        return min(method.usual_rank, widest)
    if not 1 <= rank <= widest:
        msg = f"rank {rank} is out of range; these bases allow 1 to {widest}, the short side of their widest modules"
        raise UsageError(msg)
    return rank


def check_whitening(whitening: float, method: Method) -> float:
    """The exponent of partial whitening.

    Raises:
        UsageError: it is out of range, or the method has none.
    """
    if not 0 <= whitening <= _MOST_WHITENING:
        msg = f"whitening {whitening} is out of range; wanted 0 (none) to {_MOST_WHITENING} (full)"
        raise UsageError(msg)
    if whitening and method.name != "theseus":
        msg = f"method {method.name} does not whiten activations; leave whitening out, or use theseus"
        raise UsageError(msg)
    return float(whitening)
