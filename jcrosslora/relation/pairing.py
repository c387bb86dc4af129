"""Pair each target module with the source module whose update it receives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jcrosslora.checkpoint.layout import Module
from jcrosslora.errors import PairingError

Depth = str | Sequence[int | None]
DEPTH_MAPS = ("proportional", "by-name")


@dataclass(frozen=True)
class Pair:
    """The names of a target module and of the source module whose update it receives; both have the same role."""

    target: str
    source: str
    role: str


@dataclass(frozen=True)
class Pairing:
    """The pairs of two bases, and the unpaired modules of both.

    Attributes:
        depth_map: how the layers were mapped: "proportional", "by-name" or "explicit".
        layers: for each target layer the source layer whose updates it receives, or None.
        pairs: in the order of the target's modules.
        unmapped_targets: target modules without a source module.
    """

    depth_map: str
    layers: tuple[int | None, ...]
    pairs: tuple[Pair, ...]
    unmapped_targets: tuple[str, ...]


def pair_modules(source: Mapping[str, Module], target: Mapping[str, Module], depth: Depth = "proportional") -> Pairing:
    """Pair the modules of two bases by role and by a map of the layers.

    Args:
        depth: "by-name" pairs layers of the same number and skips the deeper ones of either side (Cross-LoRA,
            Algorithm 1); "proportional" pairs target layer i with source layer floor((i + 1/2) L_src / L_tgt), at the
            same relative depth; a sequence gives the source layer of every target layer, None for none.

    Raises:
        PairingError: the map is unknown, has the wrong length or a layer that the source lacks, or pairs nothing.
    """
    layers_src, layers_tgt = (1 + max(module.layer for module in base.values()) for base in (source, target))
    layers = _layer_map(depth, layers_src, layers_tgt)
    names: dict[tuple[int | None, str], str] = {(one.layer, one.role): one.name for one in source.values()}
    found = [(module, names.get((layers[module.layer], module.role))) for module in target.values()]
    pairs = tuple(Pair(module.name, name, module.role) for module, name in found if name is not None)
    if not pairs:
        raise PairingError(f"depth map {depth!r} pairs no module of the two bases; name at least one source layer")
    return Pairing(
        depth if isinstance(depth, str) else "explicit",
        layers,
        pairs,
        unmapped_targets=tuple(module.name for module, name in found if name is None),
    )


def parse_depth(text: str) -> Depth:
    """Read a depth map from a command line: a name, or a comma-separated list such as `0,1,3,-,5`.

    Raises PairingError if the text is neither a name nor a list.
    """
    if text in DEPTH_MAPS:
        return text
    try:
        return [None if item.strip() in {"-", "none"} else int(item) for item in text.split(",")]
    except ValueError:
        names = " nor ".join(DEPTH_MAPS)
        msg = f"depth map {text!r} is neither {names} nor a list of source layers like 0,1,3,-,5"
        raise PairingError(msg) from None


def _layer_map(depth: Depth, layers_src: int, layers_tgt: int) -> tuple[int | None, ...]:
    if depth == "by-name":
        return tuple(i if i < layers_src else None for i in range(layers_tgt))
    if depth == "proportional":
        return tuple((2 * i + 1) * layers_src // (2 * layers_tgt) for i in range(layers_tgt))
    if isinstance(depth, str):
        msg = f"depth map {depth!r} is unknown; use one of {', '.join(DEPTH_MAPS)} or a list of source layers"
        raise PairingError(msg)
    if len(depth) != layers_tgt:
        msg = f"the depth map names {len(depth)} layers, but the target has {layers_tgt}; give one for each"
        raise PairingError(msg)
    wrong = [layer for layer in depth if layer is not None and not 0 <= layer < layers_src]
    if wrong:
        msg = f"the depth map names source layer {wrong[0]}, but the source has layers 0 to {layers_src - 1}"
        raise PairingError(msg)
    return tuple(depth)
