"""LoRA-Align (arXiv 2508.05232, section 3): two bases in, the maps between their modules out."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from jcrosslora.cache import Cache
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.distributed import hosts
from jcrosslora.maps.alignment.groups import align_groups, check_hosts, with_text
from jcrosslora.maps.alignment.task import plan_alignment
from jcrosslora.maps.alignment.transport import Transport
from jcrosslora.maps.evidence.base_pair import BasePair
from jcrosslora.methods import AUTO, Auto, MethodLike, make_chosen, make_method
from jcrosslora.relation.method_selection import choose_method
from jcrosslora.relation.pairing import Depth

if TYPE_CHECKING:
    from jcrosslora.evaluate.probes import Probes


def align(
    source: BaseModel | str | Path,
    target: BaseModel | str | Path,
    method: MethodLike = AUTO,
    *,
    depth: Depth = "proportional",
    seed: int = 0,
    sources: Collection[str] | None = None,
    probes: Probes | None = None,
    cache: Cache | None = None,
) -> Transport:
    """Find the maps that carry adapters of `source` over to `target`.

    Args:
        source: the base that adapters come from, opened, or what `open_base` opens.
        target: the base that they go to.
        method: a name, or a method object with its hyper-parameters, such as `methods.CrossLoRA(svd_rank=64)`; "auto"
            chooses by the weights of both bases. A method that fits an update has no maps: its fit is run by `shift`,
            adapter by adapter.
        depth: which source layer feeds which target layer, see `jcrosslora.relation.pairing.pair_modules`.
        seed: of everything that is drawn.
        sources: align only what these source modules feed (those an adapter has); None is all.
        probes: text for the methods that run both bases; None lets the source base write it.
        cache: where factors and transports are kept and looked for, such as `jcrosslora.open_cache()`; None computes
            everything and keeps nothing. The numbers are the same.

    Returns:
        The transport, on the default devices.

    Where `jax.distributed` has been initialised, all processes have to call this alike: each reads and decomposes its
    part of the modules, and all of them get the whole transport.

    Raises:
        MethodError: an unknown method, one that cannot be used on these bases, or one that several processes cannot do
            together.
        PairingError: the modules cannot be paired as asked.
        UsageError: a setting of the method, or a seed, that is out of range.
        CheckpointError: weights that cannot be read or are not finite.
        HostError: another process failed.
    """
    with hosts.together():
        pair = BasePair(open_base(source), open_base(target), cache)
        wanted = make_method(method)
        if isinstance(wanted, Auto):
            wanted = make_chosen(choose_method(pair.source, pair.target, pair.structure).method, wanted)
        task = plan_alignment(pair, wanted, depth=depth, seed=seed, sources=sources)
        check_hosts(task)
        task = with_text(task, probes)
        groups = tuple(align_groups(task))
        return task.transport(groups, [kernel for group in groups for kernel in group.kernels])
