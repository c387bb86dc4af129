"""A LoRA adapter in memory, as a pytree; and the parts of it that a method, a profile or a run supports."""

import enum
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jcrosslora.adapter.changes import ExpertUpdate, LoRAFactors, ReplacedTensors, Static, TokenUpdate, update_norm
from jcrosslora.adapter.names import ending, natural_key
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.checkpoint.wrapped import TEXT
from jcrosslora.errors import AdapterError, JCrossLoRAError
from jcrosslora.utils.texts import html_table

_ARRAYS = (np.ndarray, jax.Array, jax.ShapeDtypeStruct)


@dataclass(frozen=True)
class Earlier:
    """An adapter that another was moved from: its name and digest, the name and digest of its base, and the method.

    The names are public ones, see `public_name`.
    """

    adapter: str | None = None
    digest: str | None = None
    base: str | None = None
    base_digest: str | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        _publish(self, "adapter", "base")


@dataclass(frozen=True)
class AdapterOrigin:
    """The provenance of an adapter, as reports state it.

    Attributes:
        name: the path or hub id that it was read from, or a name given by its maker.
        base_name: public name of the base that its file states, see `public_name`; never trusted, may be None.
        form: the format of its files, "PEFT", "MLX" or "GGUF"; None for an adapter made in memory.
        digest: "sha256:..." of the weights file, or of the tensors of a live model; None for an adapter made in memory.
        revision: hub commit of an adapter that was loaded by hub id, else None.
        ignored: other contents of the files and why they do not move, one sentence each.
        kind: the kind of adapter that it was read from, such as "DoRA".
        read_as: how it was read and what that lost, one sentence without a full stop; None for a plain LoRA.
        lost: share of the update's squared Frobenius norm that reading it lost.
        licence: as the adapter's own card states it.
        licence_name: the name of a licence that the hub does not know, where `licence` is "other".
        rank_limit: the largest rank to read it at.
        alpha: the alpha given by the user for LoRA of a JAX trainer, whose files do not state it.
        invocation: token ids of its base that activate it (aLoRA); None if it is always active.
        invocation_target: the same text in token ids of the target base, see `maps.other_changes`.
        stacked: the info of each adapter in a stack, in order, see `stack_adapters`.
        earlier: the chain of adapters that it was moved from, the original first, according to its files.
    """

    name: str = "memory"
    base_name: str | None = None
    form: str | None = None
    digest: str | None = None
    revision: str | None = None
    ignored: tuple[str, ...] = ()
    kind: str = "LoRA"
    read_as: str | None = None
    lost: float = 0.0
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    rank_limit: int | None = None
    alpha: float | None = None
    invocation: tuple[int, ...] | None = None
    invocation_target: tuple[int, ...] | None = None
    stacked: "tuple[AdapterInfo, ...]" = ()
    earlier: tuple[Earlier, ...] = ()

    def __post_init__(self) -> None:
        _publish(self, "base_name")


def _publish(record: Any, *fields: str) -> None:
    """Replace names in a new record by their public ones, because records are written to files."""
    for name in fields:
        object.__setattr__(record, name, public_name(getattr(record, name)))


@dataclass(frozen=True)
class AdapterInfo(AdapterOrigin):
    """The provenance of an adapter, and the contents of its files that were not read. Compared and hashed by value.

    Attributes:
        config: the raw `adapter_config.json`, or the metadata of a GGUF file.
        base_digest: "sha256:..." of the base, which files of this package record.
        prefix: the prefix of module names in its file, see `checkpoint.wrapped`.
        chat_template: Jinja template in its folder, probably the one it was trained with.
        unread: whether it has changes of its base that were not read or were dropped; `ignored` names them.
    """

    config: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    base_digest: str | None = None
    prefix: str = TEXT
    chat_template: str | None = None
    unread: bool = False


_CHANGES = ("modules", "tokens", "replaced", "experts")


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as a pytree whose leaves are the arrays of its changes.

    Its tree structure decides the computation: names of modules and tensors, scales, ids of changed tokens, and
    invocation tokens. Figures and the rest of `info` are not part of it, so `jax.tree.map` can combine adapters from
    different files (it keeps the info of the first), and a jitted function compiles once for them. Inside a transformed
    function `info` holds only invocation tokens, and changes have no figures.

    Attributes:
        modules: maps module names as in the base model, without a PEFT prefix (`model.layers.0.self_attn.q_proj`), to
            factors.
        tokens: changes of the embedding and of the output head; read only if the base was given.
        replaced: biases, norms and whole layers that replace those of its base; only read with `replaced`.
        experts: updates of experts of its base; read only if the base was given.
    """

    modules: dict[str, LoRAFactors]
    info: AdapterInfo = field(default_factory=AdapterInfo)
    tokens: tuple[TokenUpdate, ...] = ()
    replaced: tuple[ReplacedTensors, ...] = ()
    experts: tuple[ExpertUpdate, ...] = ()

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Static]:
        """Split into the changes, with their keys, and the rest."""
        changes = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in _CHANGES)
        acts = AdapterInfo(invocation=self.info.invocation, invocation_target=self.info.invocation_target)
        return changes, Static(acts, self.info)

    @classmethod
    def tree_unflatten(cls, static: Static, children: Sequence[Any]) -> "Adapter":
        """Join what `tree_flatten_with_keys` split."""
        return cls(
            **dict(zip(_CHANGES, children, strict=True)), info=static.metadata_or_default(children, static.structure)
        )

    def __repr__(self) -> str:
        """Name, kind, number of modules, ranks and size, on one line."""
        return f"{type(self).__name__}({_headline(self)})"

    def _repr_html_(self) -> str:
        return html_table(describe_adapter(self), _headline(self))


def check_numbers(adapter: Adapter) -> Adapter:
    """Check that an adapter in memory has factors that are arrays of finite floats, and return it.

    Raises AdapterError otherwise. Values inside a transformed function are unknown and not checked.
    """
    found = adapter.modules.values() if isinstance(adapter.modules, Mapping) else [adapter.modules]
    if strange := [one for one in found if not isinstance(one, LoRAFactors)]:
        kind = type(strange[0]).__name__
        msg = f"{adapter.info.name}: modules hold a {kind}; expected a dict from the names of modules to LoRAFactors"
        raise AdapterError(msg)
    for name, factors in adapter.modules.items():
        for array in (factors.a, factors.b):
            kind = getattr(array, "dtype", type(array).__name__)
            if not isinstance(array, _ARRAYS) or not jnp.issubdtype(kind, jnp.floating):
                msg = f"{adapter.info.name}: module {name!r} has factors of {kind}; expected arrays of floats: convert "
                raise AdapterError(msg + "them")
            known = not isinstance(array, Tracer | jax.ShapeDtypeStruct) and getattr(
                array, "is_fully_addressable", True
            )
            if not math.isfinite(factors.scale) or (known and not np.isfinite(np.asarray(array)).all()):
                msg = f"{adapter.info.name}: module {name!r} holds NaN or infinite values; see where they come from"
                raise AdapterError(msg)
    return adapter


def as_adapter(given: Any) -> Adapter:
    """Return an adapter, or make one of a mapping from modules to factors; AdapterError for anything else."""
    if isinstance(given, Adapter):
        return given
    if isinstance(given, Mapping) and all(isinstance(factors, LoRAFactors) for factors in given.values()):
        return Adapter(dict(given))
    msg = f"a {type(given).__name__} is no adapter in memory: give an Adapter, such as load_adapter returns, or a "
    raise AdapterError(msg + "mapping from modules to LoRAFactors")


def describe_adapter(adapter: Adapter) -> list[dict[str, str]]:
    """Make one row of text for each role (last part of a module's name), in the order in which roles first occur.

    `norm of dW` is the Frobenius norm of all updates of the role together.
    """
    groups: dict[str, list[LoRAFactors]] = defaultdict(list)
    for name in sorted(adapter.modules, key=natural_key):
        groups[ending(name)].append(adapter.modules[name])
    return [
        {
            "module": role,
            "n": str(len(items)),
            "out x in": ", ".join(f"{rows} x {columns}" for rows, columns in sorted({item.shape for item in items})),
            "rank": ", ".join(map(str, sorted({item.rank for item in items}))),
            "scale": ", ".join(f"{scale:.4g}" for scale in sorted({item.scale for item in items})),
            "norm of dW": f"{math.hypot(*map(update_norm, items)):.4g}",
        }
        for role, items in groups.items()
    ]


def _headline(adapter: Adapter) -> str:
    # Works for tracers and ShapeDtypeStructs too, which have shapes but no values.
    items = [item for item in adapter.modules.values() if hasattr(item.a, "shape") and hasattr(item.b, "shape")]
    ranks = sorted({item.rank for item in items if len(item.a.shape) >= 2})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no ranks"
    size = sum(array.size for item in items for array in (item.a, item.b))
    experts = f", {len(adapter.experts)} updates of experts" if adapter.experts else ""
    tokens = "".join(f", {len(update.ids)} rows of {update.table}" for update in adapter.tokens)
    modules = f"{len(adapter.modules)} modules, {rank}, {size:,} numbers"
    return f"{adapter.info.name}: {adapter.info.kind}, {modules}{tokens}{experts}"


class Carried(enum.Flag):
    """The kinds of change that a method, a profile or another consumer of an adapter supports."""

    LINEAR = enum.auto()  # updates of linear modules, which everything carries
    TOKENS = enum.auto()  # changes of the embedding and the output head
    REPLACED = enum.auto()  # tensors that replace those of the base
    EXPERTS = enum.auto()  # updates of experts
    EVERYTHING = LINEAR | TOKENS | REPLACED | EXPERTS


# Kind of change -> its name in a sentence.
CHANGES = {
    "embedding": "LoRA of an embedding",
    "head": "an update of the output head",
    "tokens": "trained tokens (trainable_token_indices)",
    "bias": "trained biases",
    "lora_bias": "biases that were trained with LoRA's B (lora_bias)",
    "experts": "LoRA of experts",
    "router": "an update of the router of experts",
    "layer inputs": "updates of what makes the inputs of layers",
    "full": "whole tensors (modules_to_save)",
    "other part": "updates of other parts than the text model",
}
_SHOWN = 3  # module names in a sentence


def ignored_sentence(kind: str, names: Sequence[str], share: float | None, why: str = "") -> str:
    """Say in one sentence what does not move, and why; see `describe_change`."""
    return f"{describe_change(kind, names, share)}{f': {why}' if why else ''}."


def describe_change(kind: str, names: Sequence[str], share: float | None) -> str:
    """Describe a change (a key of `CHANGES`), its modules and its size, for a sentence.

    `share` is its share of the whole adapter's squared Frobenius norm, or None if unknown.
    """
    names = list(dict.fromkeys(names))
    listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    part = "" if share is None else f" ({share:.1%} of the whole change's squared norm)"
    return f"{CHANGES[kind]}, {listed}{part}"


def describe_experts(updates: Sequence[ExpertUpdate]) -> str:
    """Describe updates of experts and their total size, for a sentence."""
    known = [update.share for update in updates if update.share is not None]
    share = sum(known) if len(known) == len(updates) else None
    return describe_change("experts", [update.name for update in updates], share)


def why_idle(adapter: Adapter) -> str | None:
    """Return a sentence if an adapter does nothing because its updates are exactly 0, else None.

    An adapter with a change that was not read may change its base, so it gets None.
    """
    rows = any(len(update.ids) for update in adapter.tokens)  # unchanged ones are left out on reading
    experts = any(update.energy for update in adapter.experts)
    if adapter.info.unread or rows or experts or adapter.replaced or any(map(update_norm, adapter.modules.values())):
        return None
    why = "does nothing, as all its updates are 0: check that its training went on, and that not every token was masked"
    return f"{public_name(adapter.info.name)}: {why}"


def left_out(adapter: Adapter, carried: Carried, why: str) -> tuple[str, ...]:
    """Return a sentence for each change that is not carried; `why` is the reason, a phrase or ""."""
    rows = () if Carried.TOKENS in carried else adapter.tokens
    tensors = () if Carried.REPLACED in carried else adapter.replaced
    left = [ignored_sentence(change.kind, change.modules, change.share, why) for change in (*rows, *tensors)]
    if adapter.experts and Carried.EXPERTS not in carried:
        left.append(f"{describe_experts(adapter.experts)}{why and f': {why}'}.")
    return tuple(left)


def restrict(adapter: Adapter, carried: Carried, why: str) -> Adapter:
    """Return the part of an adapter that is carried; the rest is listed in `info.ignored`, see `left_out`."""
    left = left_out(adapter, carried, why)
    if not left:
        return adapter
    return replace(
        adapter,
        tokens=adapter.tokens if Carried.TOKENS in carried else (),
        replaced=adapter.replaced if Carried.REPLACED in carried else (),
        experts=adapter.experts if Carried.EXPERTS in carried else (),
        info=replace(adapter.info, ignored=adapter.info.ignored + left, unread=True),
    )


def check_always_active(adapter: Adapter, why: str, error: type[JCrossLoRAError] = AdapterError) -> None:
    """Refuse an adapter that acts only after its invocation tokens, with a message that ends in `why`."""
    if adapter.info.invocation is not None:
        raise error(f"adapter {adapter.info.name} acts only after its invocation tokens (aLoRA), {why}")
