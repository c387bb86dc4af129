"""Plan an alignment: check that it is possible, and get the text that it needs."""

import dataclasses
from collections.abc import Collection

from jcrosslora.errors import MethodError, UsageError
from jcrosslora.evaluate.probes import Probes
from jcrosslora.maps.activations import batch_probes
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.evidence import EvidenceKind
from jcrosslora.maps.method import DEFAULT_SVD_RANK, Method
from jcrosslora.maps.providers import providers_of
from jcrosslora.maps.task import AlignmentTask
from jcrosslora.relation.pairing import Depth, pair_modules

_DEFAULT_DEPTH = "proportional"


def plan_alignment(
    pair: BasePair,
    method: Method,
    *,
    depth: Depth = _DEFAULT_DEPTH,
    seed: int = 0,
    sources: Collection[str] | None = None,
) -> AlignmentTask:
    """Check whether an alignment can be done, and compute nothing else.

    `sources` are the source modules that an adapter has, whose pairs alone are aligned; None is all. `pair_modules`
    explains `depth`. Raises MethodError if the method cannot be used on these bases, PairingError if the modules cannot
    be paired as asked, and UsageError for a truncation rank out of range, or a seed outside 0 to 2^32 - 1 for a method
    that draws.
    """
    if EvidenceKind.SELECTION in method.requires:
        depth = _selected_layers(pair, depth)
    pairing = pair_modules(pair.source.modules, pair.target.modules, depth)
    stated = depth if isinstance(depth, str) else _shown(depth)
    task = AlignmentTask(pair, method, stated, seed, None if sources is None else frozenset(sources), pairing)
    _check_modules(task)
    task = dataclasses.replace(task, rank=_checked_rank(task))
    for provider in providers_of(method.requires):
        provider.check(task)
    return task


def with_text(task: AlignmentTask, probes: Probes | None) -> AlignmentTask:
    """Return the task with its text.

    `probes` is the text that both bases are run on; None lets the source write it if the maps need any. Raises
    UsageError if no text has a position that matches, and CheckpointError if a base or its tokenizer cannot be read.
    """
    if not task.reads_probes:
        return dataclasses.replace(task, probes=probes)
    probes, batches = batch_probes(task.pair, probes, seed=task.seed)
    return dataclasses.replace(task, probes=probes, batches=tuple(batches))


def _selected_layers(pair: BasePair, depth: Depth) -> tuple[int | None, ...]:
    """Return the source layer of every target layer from the structure that two bases share.

    Raises MethodError if neither base consists of parts of the other, and UsageError if another depth map than this one
    or the default was requested.
    """
    structure, reason = pair.structure
    if structure is None:
        raise MethodError(f"method select needs a base that is made of the other's parts: {reason}; use another method")
    layers = tuple(None if layer is None else layer.layer for layer in structure.layers)
    if depth != _DEFAULT_DEPTH and (isinstance(depth, str) or tuple(depth) != layers):
        msg = f"method select finds the layers by their weights, here {_shown(layers)}; leave the depth map out"
        raise UsageError(msg)
    return layers


def _shown(layers: Depth) -> str:
    return ",".join("-" if layer is None else str(layer) for layer in layers)


def _check_modules(task: AlignmentTask) -> None:
    """Raise MethodError if the method is not defined for a pair of modules."""
    method = task.method.map_method
    if method is not None and method.equal_modules:
        _check_same_modules(task)
    for pair in task.modules if method is not None and method.equal_shapes else ():
        src, tgt = task.shapes(pair)
        if src != tgt:
            raise MethodError(
                f"method {task.method.name} needs equal shapes, but {pair.source} is {src[0]} x {src[1]} and "
                f"{pair.target} is {tgt[0]} x {tgt[1]}; use cross-lora or another method that maps between widths"
            )


def _check_same_modules(task: AlignmentTask) -> None:
    src, tgt = ({name: one.shape for name, one in base.modules.items()} for base in task.pair)
    if src != tgt:
        odd = next(name for name in {**tgt, **src} if src.get(name) != tgt.get(name))
        msg = f"method {task.method.name} adds a difference of weights, and {task.pair.source.name} and "
        msg += f"{task.pair.target.name} differ in {odd}: it needs bases with the same modules; use another method"
        raise MethodError(msg)


def _checked_rank(task: AlignmentTask) -> int:
    """Return the truncation rank: the method's own, or its default if the modules are smaller; 0 without maps."""
    widest = max((min(*src, *tgt) for src, tgt in map(task.shapes, task.modules)), default=0)
    rank = getattr(task.method, "svd_rank", DEFAULT_SVD_RANK)
    if widest == 0 or rank == getattr(type(task.method), "svd_rank", DEFAULT_SVD_RANK):
        return min(rank, widest)
    if not 1 <= rank <= widest:
        msg = f"svd_rank {rank} is out of range; these bases allow 1 to {widest}, their widest modules' short side"
        raise UsageError(msg)
    return rank
