"""Rules by which a family reads windows and rotary positions from a configuration, and its form in GGUF files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jcrosslora.architectures.names import EMBEDDING

FULL, SLIDING = "full_attention", "sliding_attention"  # the kinds of layers, by what they see
# From a configuration and the kind of each layer to whether each has positions. It raises CheckpointError.
RotatedRule = Callable[[Mapping[str, Any], Sequence[str]], Sequence[bool]]


def windowed(config: Mapping[str, Any], kinds: Sequence[str]) -> list[bool]:
    """Give layers with windows positions, and those of full attention none."""
    del config
    return [kind == SLIDING for kind in kinds]


@dataclass(frozen=True)
class Windows:
    """Which layers see only the last positions.

    Attributes:
        size: default of the number of these positions, the layer's own included.
        size_key: its configuration key.
        chunked: whether the positions of a text are in chunks of that number, and such a layer sees those of its own
            chunk; `layer_types` then names it "chunked_attention".
        switch: configuration key without which there are no windows.
        period: the last layer of each period of this many has full attention; None if all layers have windows.
        period_keys: configuration keys of the period.
        first: configuration key of the number of layers in front without windows, and its default.
        which: "rotated" or "unrotated" if just the layers with positions, or without, have windows.
        listed: whether `layer_types` counts; if not, it must not contradict the rest.
    """

    size: int | None = 4096
    size_key: str = "sliding_window"
    chunked: bool = False
    switch: str | None = None
    period: int | None = None
    period_keys: tuple[str, ...] = ()
    first: tuple[str, int] | None = None
    which: Literal["rotated", "unrotated"] | None = None
    listed: bool = True


@dataclass(frozen=True)
class Positions:
    """How the rotary positions differ from those of Llama.

    Attributes:
        theta: default base of the frequencies.
        local_theta: default base in layers with windows, if these have settings of their own, which `rope_theta` and
            `rope_scaling` do not change; else None.
        local_theta_key: configuration key of that base.
        settings: rope settings where the configuration states none.
        share: default share of a head's features that are rotated; None if it is always the whole.
        interleaved: whether features 2i and 2i + 1 are rotated together, instead of i and i + pairs.
        rotated: says which layers have positions; None if all have.
        types: rope types beside those of all families.
        aliases: other names of rope types.
        outer_original: default of `original_max_position_embeddings` if that is a key of the configuration itself.
        grows: whether queries grow with the position, by `llama_4_scaling_beta` of the rope settings.
        unrotated_grow: whether those of layers without positions do, by the configuration keys `attn_scale` and
            `floor_scale`, if `attn_temperature_tuning` says so.
    """

    theta: float = 10_000.0
    local_theta: float | None = None
    local_theta_key: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    share: float | None = None
    interleaved: bool = False
    rotated: RotatedRule | None = None
    types: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    outer_original: int | None = None
    grows: bool = False
    unrotated_grow: bool = False


@dataclass(frozen=True)
class StoredNames:
    """How files and the class of a family name tensors, where the two differ or another name than usual is used.

    Attributes:
        embedding: the module of the class that is the embedding.
        prefixes: of names in files -> of those in the class.
        modules: module of a layer in files -> in the class. Those of one name in the class hold its rows one behind
            another, in this order.
    """

    embedding: str = EMBEDDING.removesuffix(".weight")
    prefixes: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)

    def tensor_prefixes(self) -> dict[str, str]:
        """Return prefixes of names in files and in the class -> of those by which the package calls tensors.

        The first that matches applies; there are none where all names are the same.
        """
        found, known, own = dict(self.prefixes), EMBEDDING.removesuffix("weight"), f"{self.embedding}."
        if own != known:
            named = {stored + own.removeprefix(new) for stored, new in found.items() if own.startswith(new)}
            found = dict.fromkeys((own, *sorted(named)), known) | found
        return found | {"": ""} if found else {}


# From the metadata of a file, keys without the architecture, and the layers that hold each tensor, by its name in a
# layer, to configuration keys. It raises CheckpointError for metadata that it cannot read.
GgufSettings = Callable[[Mapping[str, Any], Mapping[str, frozenset[int]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp's converter stores models of a family.

    Attributes:
        architecture: `general.architecture`.
        expert_architecture: that of models with experts, if it is another.
        permuted: whether the rows of q and k are in the order of llama.cpp's rotation, see `unpermuted_rows`.
        names: place in `Family.norms` -> name of the tensor, where it is not the usual one.
        final_norm: name of the tensor of the norm in front of the output head.
        tiled: whether heads of values of the delta rule take turns by their groups.
        tensors: tensor of a layer -> its name in a layer of the model, for what is not a whole matrix of the family,
            norm or tensor of experts. Those of one name hold its rows one behind another, in this order.
        counts: configuration key -> metadata key of an integer.
        numbers: configuration key -> metadata key of a number.
        implied: configuration keys and values that files do not state.
        rope: settings of a scaled rotation that files do not state.
        arrays: tensor of a layer of one number -> key, without the architecture, of the list of those of all layers.
        settings: finds what else the configuration has.
        read_as_other: whether files are read as another family of the architecture, which computes the same; adapters
            are read and written for both.
    """

    architecture: str
    expert_architecture: str | None = None
    permuted: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    final_norm: str = "output_norm"
    tiled: bool = False
    tensors: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, str] = field(default_factory=dict)
    settings: GgufSettings | None = None
    read_as_other: bool = False

    @property
    def architectures(self) -> tuple[str, ...]:
        """`general.architecture` of models without experts and with them; one where it is the same."""
        return tuple(dict.fromkeys((self.architecture, self.expert_architecture or self.architecture)))
