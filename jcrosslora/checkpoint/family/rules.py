"""Rules by which a family reads numbers, windows and rotary positions from a configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol


class Sizes(Protocol):
    """The sizes that shapes follow from, see `jcrosslora.checkpoint.Dims`."""

    @property
    def hidden(self) -> int: ...  # noqa: D102
    @property
    def intermediate(self) -> int: ...  # noqa: D102
    @property
    def heads(self) -> int: ...  # noqa: D102
    @property
    def kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102


class LatentSizes(NamedTuple):
    """The sizes of latent attention.

    Attributes:
        rank: features of the latent of keys and values.
        plain: features of a head of queries and keys without positions.
        rotated: features of a head of queries and keys with positions.
        value: features of a head of values.
    """

    rank: int
    plain: int
    rotated: int
    value: int


class HeadSizes(NamedTuple):
    """The heads of one kind of attention.

    Attributes:
        kv_heads: number of key and value heads.
        size: features of a head.
    """

    kv_heads: int
    size: int


# From the sizes of a model and its configuration to the shape (O, I) of a role.
RoleShape = Callable[[Sizes, Mapping[str, Any]], tuple[int, int]]


@dataclass(frozen=True)
class LayerTensor:
    """A tensor of a layer that is neither a linear module nor a norm, such as a router.

    Attributes:
        path: its name inside a layer, e.g. "mlp.gate.weight".
        shape: from the sizes of a model and its configuration to its shape.
        exact: whether it is float32 in every forward pass, instead of the dtype of the weights.
    """

    path: str
    shape: Callable[[Sizes, Mapping[str, Any]], tuple[int, ...]]
    exact: bool = True


@dataclass(frozen=True)
class Number:
    """A positive number that follows from a configuration.

    Attributes:
        key: its configuration key; "" if all models have the default.
        default: value where the configuration does not state it; None if it must, or if there is none then.
        power: of that value, which is the number.
    """

    key: str
    default: float | None = None
    power: float = 1.0


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
        size_key: configuration key of the features of a head that have positions; None for those of the whole head.
        share: default share of a head's features that are rotated; None if it is always the whole.
        interleaved: whether features 2i and 2i + 1 are rotated together, instead of i and i + pairs.
        unrotated: layers without positions: those with a 0 in `no_rope_layers`, by default each fourth; "full", those
            of full attention; "full beside windows", the same if there is a `sliding_window`; "full behind prefix", the
            same without those with a dense MLP if `prefix_dense_sliding_window_pattern` is 1; "not rope", all unless
            `position_embedding_type` is "rope"; "no theta", all if `rope_theta` of `rope_parameters` is null; None for
            no layer.
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
    size_key: str | None = None
    share: float | None = None
    interleaved: bool = False
    unrotated: (
        Literal["no_rope_layers", "full", "full beside windows", "full behind prefix", "not rope", "no theta"] | None
    ) = None
    types: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    outer_original: int | None = None
    grows: bool = False
    unrotated_grow: bool = False


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
