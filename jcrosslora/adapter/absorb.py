"""Split an adapter in two: LoRA of linear modules, which engines load, and the rest, which goes into its base.

The two together are the adapter, exactly: norms, biases and matrices that it replaces are tensors of the base, new rows
of the embedding or the head are rows of it, and updates of experts are added to their weights. A whole linear layer
(`modules_to_save`) becomes a LoRA if its change has a low enough rank.
"""

from dataclasses import dataclass, replace

import numpy as np

from jcrosslora.adapter.changes import LoRAFactors, ReplacedTensors
from jcrosslora.adapter.fused import split_fused
from jcrosslora.adapter.records import Adapter, Carried, left_out
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.experts import is_loadable

_EXACT = 2.0**-20  # of ||W||_F: float32 rounds W itself by up to 2^-24
_MORE = 8  # columns of the sketch beyond the rank


@dataclass(frozen=True, eq=False)
class Split:
    """An adapter in two parts.

    Attributes:
        kept: its updates of linear modules, and of experts that are not stored as classes load them.
        absorbed: the rest, for the base.
        as_lora: names of the base's tensors that the adapter replaces, and that `kept` has as LoRA.
    """

    kept: Adapter
    absorbed: Adapter
    as_lora: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What goes where, one sentence each; what stays where it was is left out."""
        made = (f"in the adapter: {', '.join(self.as_lora)}, as LoRA",) if self.as_lora else ()
        return (*(f"in the base: {part}" for part in left_out(self.absorbed, Carried.LINEAR, "")), *made)

    @property
    def changes_base(self) -> bool:
        """Whether anything goes into the base."""
        return bool(self.absorbed.tokens or self.absorbed.replaced or self.absorbed.experts)


def split_for_base(adapter: Adapter, base: BaseModel) -> Split:
    """Split an adapter of a base."""
    rank = max((factors.rank for factors in adapter.modules.values()), default=0)
    weights = {module.tensor for module in base.modules.values()} if rank else set()
    found: dict[str, LoRAFactors] = {}
    replaced: list[ReplacedTensors] = []
    for group in adapter.replaced:
        low = {
            name: _low_rank(base, name, np.asarray(group.tensors[name]), rank)
            for name in group.tensors
            if name in weights
        }
        found |= {name: factors for name, factors in low.items() if factors is not None}
        left = {name: array for name, array in group.tensors.items() if name not in found}
        replaced += [replace(group, tensors=left, share=group.share if len(left) == len(group.tensors) else None)]
    stored = {name.removesuffix(".weight"): factors for name, factors in found.items()}
    modules = {**adapter.modules, **split_fused(Adapter(stored), base.fused).modules}
    loadable = base.expert_layout is not None and is_loadable(base.expert_layout)
    of_base, of_adapter = (adapter.experts, ()) if loadable else ((), adapter.experts)
    groups = tuple(group for group in replaced if group.tensors)
    rest = Adapter(
        {}, replace(adapter.info, ignored=(), base_name=None, base_digest=None), adapter.tokens, groups, of_base
    )
    kept = replace(adapter, modules=modules, tokens=(), replaced=(), experts=of_adapter)
    return Split(kept, rest, tuple(found))


def _low_rank(base: BaseModel, name: str, new: np.ndarray, rank: int) -> LoRAFactors | None:
    """Return factors of the change of a weight; None if it has a higher rank.

    A sketch of the change D by random columns spans its columns if its rank is no higher than their number.
    """
    change = new.astype(np.float64) - np.asarray(base.tensor(name)).astype(np.float64)
    random = np.random.default_rng(0).normal(size=(change.shape[1], min(rank + _MORE, *change.shape)))
    q, _ = np.linalg.qr(change @ random)
    u, s, v = np.linalg.svd(q.T @ change, full_matrices=False)
    count = max(1, int(np.sum(s[:rank] > _EXACT * s[0])))
    a, b = v[:count], (q @ u[:, :count]) * s[:count]
    if np.linalg.norm(change - b @ a) > _EXACT * np.linalg.norm(new.astype(np.float64)):
        return None
    return LoRAFactors(a=a.astype(np.float32), b=b.astype(np.float32))
