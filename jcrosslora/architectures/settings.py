"""The settings of a forward pass, read from a configuration (hashable, static under jit); and an empty cache."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jcrosslora.architectures.architecture import Architecture, Layer, layers_with
from jcrosslora.architectures.blocks import Block, RecurrentBlock
from jcrosslora.architectures.config import (
    FULL,
    SLIDING,
    Number,
    layer_kinds,
    listed_rotated,
    period_of,
    read_number,
    refuse,
)
from jcrosslora.architectures.family import Family, Windows
from jcrosslora.architectures.rope_settings import layer_ropes
from jcrosslora.architectures.run import EMPTY, BlockSettings, KVCache
from jcrosslora.errors import CheckpointError

# Name in configurations -> name in `ops.ACTIVATIONS`.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class DecoderSettings(BlockSettings):
    """The settings of one model's forward pass, including those of its blocks.

    Attributes:
        final_soft_cap: soft cap of the logits, or None.
        tied: whether the head is the embedding.
        windows: (L,) number of positions that a layer sees, the query's own included; None for full attention.
        layer_ropes: (L,) index into `ropes`.
    """

    final_soft_cap: float | None
    embedding_scale: float
    logit_scale: float
    tied: bool
    biased_roles: tuple[str, ...]
    windows: tuple[int | None, ...]
    layer_ropes: tuple[int, ...]
    stack: tuple[Layer, ...]

    def layers_with(self, name: str) -> tuple[int, ...]:
        """Return the layers that have a role, norm or tensor of this name."""
        return layers_with(self.stack, name)

    def ropes_of(self, mixer: Block | None) -> tuple[int, ...]:
        """Return the rotary settings of the layers with this mixer, as indices into `ropes`."""
        return tuple(
            sorted({rope for rope, own in zip(self.layer_ropes, self.stack, strict=True) if own.mixer == mixer})
        )

    @property
    def switches(self) -> tuple[int, ...]:
        """The text lengths, in tokens, above which a rope switches to its long frequencies, ascending."""
        return tuple(sorted({rope.switch for rope in self.ropes if rope.switch is not None}))

    @property
    def recurrent(self) -> bool:
        """Whether a layer keeps a state other than keys and values."""
        return any(layer.recurrent for layer in set(self.stack))


def last_keys(settings: DecoderSettings, x: jax.Array) -> KVCache | None:
    """Create the state that layers with shared keys read in a pass over x (B, T, H) without a cache; None if unused."""
    read = {block.shared_kind for layer in settings.stack for block in layer.blocks} - {None}
    if not read:
        return None
    cache = init_cache(settings, x.shape[0], x.shape[1], x.dtype)
    one = {kind: jax.tree.map(lambda stack: stack[:1], state) for kind, state in cache.states.items() if kind in read}
    return cache.replace(states=one, last_only=True)  # pyright: ignore[reportAttributeAccessIssue]


def init_cache(settings: DecoderSettings, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> KVCache:
    """Create an empty cache for `batch` sequences of up to `length` tokens, padding included."""
    counts = Counter(kind for layer in settings.stack for kind in layer.kinds)
    forms = {}
    for layer in dict.fromkeys(settings.stack):
        forms |= layer.states(batch, length, dtype)
    return KVCache(
        positions=jnp.full((batch, length), EMPTY, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
        states={
            kind: jax.tree.map(lambda x, layers=counts[kind]: jnp.zeros((layers, *x.shape), x.dtype), form)
            for kind, form in forms.items()
        },
    )


def read_settings(model: Architecture, ref: str) -> DecoderSettings:
    """Read the settings of a model; errors name it `ref`.

    Raises CheckpointError if its configuration has a setting that the decoder does not support; the message names it.
    """
    try:
        return _settings(model)
    except CheckpointError as error:
        raise CheckpointError(f"{ref}: {error}") from error


def _settings(model: Architecture) -> DecoderSettings:
    config, family, dims = model.config, model.family, model.dims

    def factor(number: Number | None, usual: float = 1.0) -> float:
        return usual if number is None else read_number(config, number)

    def factors(numbers: Mapping[str, Number]) -> tuple[tuple[str, float], ...]:
        return tuple((role, found) for role, number in numbers.items() if (found := factor(number)) != 1.0)

    kinds = _layer_kinds(config, family, dims.layers)
    norm, eps = family.norm_of(config)
    of_layers = layer_ropes(model, kinds)
    ropes = tuple(dict.fromkeys(of_layers))
    return DecoderSettings(
        **asdict(dims),
        eps=read_number(config, eps),
        layer_norm=norm == "layer",
        activation=_activation(config, family),
        attn_scale=factor(family.attn_scale, dims.head_dim**-0.5),
        attn_soft_cap=_cap(config, family.attn_soft_cap),
        residual_scale=factor(family.residual_scale),
        parallel=family.parallel,
        interleaved=family.positions.interleaved,
        chunked_windows=family.windows is not None and family.windows.chunked,
        input_factors=factors(family.input_factors),
        output_factors=factors(family.output_factors),
        ropes=ropes,
        final_soft_cap=_cap(config, family.final_soft_cap),
        embedding_scale=factor(family.embedding_scale),
        logit_scale=factor(family.logit_scale),
        tied=family.is_tied(config),
        biased_roles=family.biased_roles(config),
        windows=_layer_windows(kinds, config, family),
        layer_ropes=tuple(map(ropes.index, of_layers)),
        stack=model.stack,
    )


def _activation(config: Mapping[str, Any], family: Family) -> str:
    key = family.activation_key
    name = config.get(key) or family.activation
    # With activation tensors, only the family's own activation reads them.
    own = {family.activation: family.activation} if family.activation_tensors else _ACTIVATIONS
    if name not in own:
        raise CheckpointError(f"{key} {name!r} is not supported; supported: {', '.join(own)}")
    return own[name]


def _cap(config: Mapping[str, Any], number: Number | None) -> float | None:
    if number is None or config.get(number.key, number.default) is None:
        return None
    return read_number(config, number)


_CHUNKED = "chunked_attention"  # configurations' name of layers with chunked windows


def _layer_kinds(config: Mapping[str, Any], family: Family, layers: int) -> tuple[str, ...]:
    """Return (L,) "full_attention" or "sliding_attention"."""
    if any(issubclass(block, RecurrentBlock) for block in family.blocks):
        return (FULL,) * layers  # `layer_types` says which layers have attention
    chunked = family.windows is not None and family.windows.chunked
    stated = layer_kinds(config, {FULL: FULL, _CHUNKED if chunked else SLIDING: SLIDING}, layers)
    if stated is None:
        return _implied_kinds(config, family, layers)
    # transformers ignores the list for these families and uses sliding_window alone.
    if not (family.windows and family.windows.listed) and tuple(stated) != _implied_kinds(config, family, layers):
        raise CheckpointError(f"layer_types of a {family.name} model contradict its sliding_window")
    return tuple(stated)


def _layer_windows(kinds: tuple[str, ...], config: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """Return (L,) the number of positions that each layer sees, the query's included; None for full attention."""
    window = _window(config, family)
    if window is None and SLIDING in kinds:
        key = (family.windows or Windows()).size_key
        raise CheckpointError(f"layer {kinds.index(SLIDING)} has a window, but no {key} is set or in use")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    """Return the number of positions that a sliding layer sees, None if no layer slides."""
    windows = family.windows
    if windows is None or (windows.switch is not None and not config.get(windows.switch)):
        return None
    window = config.get(windows.size_key, windows.size)
    if window is not None and (type(window) is not int or window <= 0):
        refuse(windows.size_key, window, "a positive integer or null")
    return window


def _implied_kinds(config: Mapping[str, Any], family: Family, layers: int) -> tuple[str, ...]:
    window, windows = _window(config, family), family.windows or Windows()
    if windows.period is not None:
        period = period_of(config, windows.period_keys, windows.period)
        return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))
    if windows.which is not None:
        rotated, wanted = listed_rotated(config, layers), windows.which == "rotated"
        return tuple(SLIDING if window is not None and turns == wanted else FULL for turns in rotated)
    first = 0
    if windows.first is not None:
        key, default = windows.first
        first = config.get(key, default)
        if type(first) is not int:
            refuse(key, first, "an integer")
    return tuple(SLIDING if window is not None and layer >= first else FULL for layer in range(layers))
