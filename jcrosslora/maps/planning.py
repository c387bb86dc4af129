"""Plan a transfer between two bases: check that it is possible, and get the text for it."""

import dataclasses
from collections.abc import Collection

from jcrosslora.adapter import Adapter
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.evaluate.probes import written_probes
from jcrosslora.maps.activations import batch_probes
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.evidence import EvidenceKind
from jcrosslora.maps.method import DEFAULT_SVD_RANK, Method, Plan
from jcrosslora.maps.providers import providers_of
from jcrosslora.maps.shift import map_adapter
from jcrosslora.maps.transport import Transport
from jcrosslora.relation.pairing import Depth, pair_modules

_DEFAULT_DEPTH = "proportional"


def plan_between(
    pair: BasePair,
    method: Method,
    *,
    depth: Depth = _DEFAULT_DEPTH,
    seed: int = 0,
    sources: Collection[str] | None = None,
) -> Plan:
    """Check that a method can move updates between two bases, and return a plan without an adapter.

    Only pairs with a source module in `sources` are aligned; None means all. `pair_modules` explains `depth`.

    Raises:
        MethodError: the method cannot be used on these bases.
        PairingError: the modules cannot be paired by this depth map.
        UsageError: the truncation rank is out of range, the method finds another depth map itself, or it draws random
            numbers and the seed is not 0 to 2^32 - 1.
    """
    stated = depth if isinstance(depth, str) else _shown(depth)
    plan = Plan(method, pair.target, Adapter({}), pair, depth=stated, seed=seed)
    if method.map_method is None:
        return plan
    if EvidenceKind.SELECTION in method.requires:
        depth = _selected_layers(pair, depth)
        plan = dataclasses.replace(plan, depth=_shown(depth))
    pairing = pair_modules(pair.source.modules, pair.target.modules, depth)
    plan = dataclasses.replace(
        plan, apply_maps=map_adapter, pairing=pairing, sources=None if sources is None else frozenset(sources)
    )
    _check_modules(plan)
    plan = dataclasses.replace(plan, rank=_checked_rank(plan))
    for provider in providers_of(method.requires):
        provider.check(plan)
    return plan


def plan_through(pair: BasePair, method: Method, transport: Transport) -> Plan:
    """Return a plan without an adapter for transfers through maps that are made already."""
    recipe = transport.recipe
    return Plan(
        method,
        pair.target,
        Adapter({}),
        pair,
        depth=recipe.depth,
        pairing=transport.pairing,
        rank=recipe.settings.get("svd_rank", 0),
        groups=transport.groups,
        apply_maps=None if method.map_method is None else map_adapter,
    )


def with_text(plan: Plan) -> Plan:
    """Return the plan with the text to run both bases on: the user's, or texts that the source writes.

    Completions are written later, with the adapter.

    Raises:
        UsageError: no text has a matching position.
        CheckpointError: a base or its tokenizer cannot be read.
    """
    method, probes = plan.method, plan.given
    if not method.runs_bases:
        return plan
    if not plan.needs_text:
        return dataclasses.replace(plan, probes=probes)
    if probes is None and plan.probe_count:
        probes = written_probes(plan.pair.source, plan.probe_count, seed=plan.seed)
    probes, batches = batch_probes(plan.pair, probes, seed=plan.seed)
    return dataclasses.replace(plan, probes=probes, batches=tuple(batches))


def _selected_layers(pair: BasePair, depth: Depth) -> tuple[int | None, ...]:
    """Return the source layer of every target layer, from the structure of the pair.

    Raises MethodError if neither base consists of parts of the other, and UsageError if the requested depth map is
    neither this one nor the default.
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


def _check_modules(plan: Plan) -> None:
    """Raise MethodError if the method is not defined for these modules."""
    method = plan.method.map_method
    if method is not None and method.equal_modules:
        _check_same_modules(plan)
    for pair in plan.modules if method is not None and method.equal_shapes else ():
        src, tgt = plan.shapes(pair)
        if src != tgt:
            raise MethodError(
                f"method {plan.method.name} needs equal shapes, but {pair.source} is {src[0]} x {src[1]} and "
                f"{pair.target} is {tgt[0]} x {tgt[1]}; use cross-lora or another method that maps between widths"
            )


def _check_same_modules(plan: Plan) -> None:
    src, tgt = ({name: one.shape for name, one in base.modules.items()} for base in plan.pair)
    if src != tgt:
        odd = next(name for name in {**tgt, **src} if src.get(name) != tgt.get(name))
        msg = f"method {plan.method.name} adds a difference of weights, and {plan.pair.source.name} and "
        msg += f"{plan.pair.target.name} differ in {odd}: it needs bases with the same modules; use another method"
        raise MethodError(msg)


def _checked_rank(plan: Plan) -> int:
    """Return the truncation rank, 0 without maps; a default rank is lowered to the short side of the widest modules.

    Raises UsageError if another rank is out of range.
    """
    widest = max((min(*src, *tgt) for src, tgt in map(plan.shapes, plan.modules)), default=0)
    rank = getattr(plan.method, "svd_rank", DEFAULT_SVD_RANK)
    if widest == 0 or rank == getattr(type(plan.method), "svd_rank", DEFAULT_SVD_RANK):
        return min(rank, widest)
    if not 1 <= rank <= widest:
        msg = f"svd_rank {rank} is out of range; these bases allow 1 to {widest}, their widest modules' short side"
        raise UsageError(msg)
    return rank
