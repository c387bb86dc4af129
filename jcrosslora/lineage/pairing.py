"""Which source module feeds which target module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from jcrosslora.errors import PairingError

Depth = str | Sequence[int | None]
# Known from the numbers of layers alone.
DEPTH_MAPS = ("proportional", "by-name")
# Found by running both bases on text, see `jcrosslora.alignment.layer_similarity`.
SIMILAR = "similar"


class ModuleLike(Protocol):
    """What pairing needs to know of a linear module."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def layer(self) -> int: ...  # noqa: D102
    @property
    def role(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Pair:
    """One target module and the source module whose update it receives, by name; both have the same role."""

    target: str
    source: str
    role: str


@dataclass(frozen=True)
class Pairing:
    """The pairs of two bases, and what is left over on both sides.

    Attributes:
        depth_map: how the layers were mapped: "proportional", "by-name", "similar" or "explicit".
        layers: for each target layer the source layer that feeds it, or None.
        pairs: in the target's order of modules.
        unmapped_targets: target modules that receive nothing.
        unused: source modules whose update goes nowhere.
    """

    depth_map: str
    layers: tuple[int | None, ...]
    pairs: tuple[Pair, ...]
    unmapped_targets: tuple[str, ...]
    unused: tuple[str, ...]


def pair_modules(
    source: Mapping[str, ModuleLike], target: Mapping[str, ModuleLike], depth: Depth = "proportional"
) -> Pairing:
    """Pair the modules of two bases by role and by a map of the layers.

    Args:
        source: the source base's modules by name.
        target: the target base's modules by name.
        depth: "by-name" gives target layer i the source layer i (Cross-LoRA, Algorithm 1: deeper layers of either
            side are skipped); "proportional" gives it the source layer at the same relative depth,
            floor((i + 1/2) L_src / L_tgt); a sequence names the source layer of every target layer, None for none.

    The map "similar" is not known here: it becomes a sequence once both bases have run (`alignment.layer_similarity`).

    Raises:
        PairingError: an unknown map, a list of the wrong length or naming a layer that the source does not have,
            or no pair at all.
    """
    layers_src, layers_tgt = _layer_count(source), _layer_count(target)
    layers = _layer_map(depth, layers_src, layers_tgt)
    by_place: dict[tuple[int | None, str], str] = {
        (module.layer, module.role): module.name for module in source.values()
    }
    pairs, unmapped_targets = [], []
    for module in target.values():
        feeder = by_place.get((layers[module.layer], module.role))
        if feeder is None:
            unmapped_targets.append(module.name)
        else:
            pairs.append(Pair(module.name, feeder, module.role))
    if not pairs:
        msg = f"depth map {depth!r} pairs no module of the source with one of the target; name at least one layer"
        raise PairingError(msg)
    used = {pair.source for pair in pairs}
    unused = tuple(name for name in source if name not in used)
    kind = depth if isinstance(depth, str) else "explicit"
    return Pairing(kind, layers, tuple(pairs), tuple(unmapped_targets), unused)


def parse_depth(text: str) -> Depth:
    """Read a depth map from a command line: a name, or a comma-separated list such as `0,1,3,-,5`.

    Raises:
        PairingError: the text is neither.
    """
    if text in (*DEPTH_MAPS, SIMILAR):
        return text
    try:
        return [None if item.strip() in {"-", "none"} else int(item) for item in text.split(",")]
    except ValueError:
        names = " nor ".join((*DEPTH_MAPS, SIMILAR))
        msg = f"depth map {text!r} is neither {names} nor a list of source layers like 0,1,3,-,5"
        raise PairingError(msg) from None


def _layer_count(modules: Mapping[str, ModuleLike]) -> int:
    return 1 + max(module.layer for module in modules.values())


def _layer_map(depth: Depth, layers_src: int, layers_tgt: int) -> tuple[int | None, ...]:
    if depth == "by-name":
        return tuple(i if i < layers_src else None for i in range(layers_tgt))
    if depth == "proportional":
        return tuple((2 * i + 1) * layers_src // (2 * layers_tgt) for i in range(layers_tgt))
    if depth == SIMILAR:
        msg = f"depth map {depth!r} is found by running both bases; name it to `align` or `transfer`"
        raise PairingError(msg)
    if isinstance(depth, str):
        msg = f"depth map {depth!r} is unknown; use one of {', '.join(DEPTH_MAPS)} or a list of source layers"
        raise PairingError(msg)
    if len(depth) != layers_tgt:
        msg = f"the depth map names {len(depth)} layers but the target has {layers_tgt}; name one source layer for each"
        raise PairingError(msg)
    wrong = [layer for layer in depth if layer is not None and not 0 <= layer < layers_src]
    if wrong:
        msg = f"the depth map names source layer {wrong[0]}, but the source has layers 0 to {layers_src - 1}"
        raise PairingError(msg)
    return tuple(depth)
