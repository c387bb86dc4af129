"""Encoders of prompts: the lower half of the base, a model of sentence-transformers, or none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.architectures.architecture import layer_forward
from jcrosslora.architectures.run import KVCache, LayerWeights
from jcrosslora.architectures.settings import last_keys
from jcrosslora.checkpoint import BaseModel, Tokenizer, load_tokenizer, pad_right
from jcrosslora.decoder import DecoderSettings, Model, fast_dtype, load_model
from jcrosslora.decoder.forward import context_of, embed
from jcrosslora.decoder.layer_stack import layer_at
from jcrosslora.decoder.layout import Layout
from jcrosslora.errors import UsageError, not_finite, suggestion
from jcrosslora.text import Prompt, prompt_text

HIDDEN, SENTENCES, NOTHING = "hidden", "sentences", "none"
_DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_SAFE_MAJOR = 6  # first major version of sentence-transformers that runs no code of a model in a local folder
# Makes vectors of P prompts, float32 (P, D), each with a root mean square of 1. Messages are read without a template.
Encoder = Callable[[Sequence[Prompt]], np.ndarray]
State = tuple[jax.Array, KVCache | None]
_WIDTHS, _ROWS = (32, 64, 128), 8  # shapes (B, T): the fewer, the less to compile; further tokens are not read


def check_encoder(name: str) -> str:
    """Return a name in full, "hidden", "none" or "sentences:MODEL"; raise UsageError if it is unknown."""
    kind, _, model = name.partition(":")
    if kind == SENTENCES:
        return f"{SENTENCES}:{model or _DEFAULT_MODEL}"
    if name not in (HIDDEN, NOTHING):
        known = (HIDDEN, SENTENCES, NOTHING)
        msg = f"encoder {name!r} is unknown{suggestion(kind, known)}; use {HIDDEN}, {SENTENCES}:MODEL or {NOTHING}"
        raise UsageError(msg)
    return name


def open_encoder(name: str, base: BaseModel) -> Encoder:
    """Load an encoder by its full name, see `check_encoder`; that of "none" makes empty vectors (P, 0).

    Raises UsageError if it cannot be loaded, CheckpointError if the base cannot be read or the decoder lacks it.
    """
    if name == NOTHING:
        return lambda prompts: np.zeros((len(prompts), 0), np.float32)
    if name == HIDDEN:
        return HiddenStates.of(base).encode
    return _sentence_encoder(name.partition(":")[2])


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The mean of the base's residual stream after its middle layer, over the tokens of a prompt."""

    model: Model  # for the embedding
    tokenizer: Tokenizer
    layers: tuple[LayerWeights, ...]  # up to the middle one
    name: str  # of the base, for messages

    @classmethod
    def of(cls, base: BaseModel) -> "HiddenStates":
        """Load a base; raise CheckpointError if it cannot be read or the decoder does not support it."""
        tokenizer, model = load_tokenizer(base), load_model(base, fast_dtype())
        count = max(1, base.dims.layers // 2)
        layers = tuple(layer_at(model.settings, model.params, None, layer) for layer in range(count))
        return cls(model, tokenizer, layers, base.ref)

    def encode(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Encode prompts, float32 (P, H), each row with a root mean square of 1.

        At most the first 128 tokens of a prompt are read, and the mean leaves out the first one: models keep large
        numbers there that do not depend on the text. Raises CheckpointError if a state is not finite.
        """
        rows = [self.tokenizer.encode(prompt_text(prompt)).ids[: _WIDTHS[-1]] for prompt in prompts]
        found = np.zeros((len(rows), self.model.settings.hidden), np.float32)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for first in range(0, len(order), _ROWS):
            part = order[first : first + _ROWS]
            width = next(width for width in _WIDTHS if len(rows[part[-1]]) <= width)
            count = 1 if len(rows) == 1 else _ROWS
            tokens, mask = pad_right([rows[row] for row in part], (count, width))
            found[part] = self._means(tokens, mask)[: len(part)]
        if not np.isfinite(found).all():
            raise not_finite(self.name)
        return _unit_rms(found)

    def _means(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        seen = jnp.asarray(mask)
        x, inputs = _embed(self.model, jnp.asarray(tokens))
        cache = last_keys(self.model.settings, x)
        for layer in self.layers:
            x, cache = _run_layer(self.model.settings, layer, seen, (x, cache), inputs)
        return np.asarray(_mean(x, seen))


@jax.jit
def _embed(model: Model, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return embed(model, tokens)


@partial(jax.jit, static_argnums=0)
def _run_layer(
    settings: DecoderSettings, layer: LayerWeights, mask: jax.Array, before: State, inputs: jax.Array | None
) -> State:
    context = context_of(settings, Layout.of(mask), inputs)
    return layer_forward(settings, layer, context, *before)[:2]


@jax.jit
def _mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean (B, H) of states (B, T, H) that are scaled to a root mean square of 1 first: some tokens have large ones."""
    x = x.astype(jnp.float32)
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-12)
    several = mask.sum(axis=1, keepdims=True) > 1
    used = (mask & ((jnp.arange(mask.shape[1])[None] > 0) | ~several)).astype(jnp.float32)
    total = jnp.sum(x * used[..., None], axis=1)
    return total / jnp.maximum(used.sum(axis=1, keepdims=True), 1.0)


def _sentence_encoder(model: str) -> Encoder:
    """Load a model of sentence-transformers by its hub id or from its folder.

    Raises UsageError if the package is missing or too old, or the model cannot be loaded or needs custom code.
    """
    named = f"encoder sentences:{model}"
    instead = "install jcrosslora[sentences], or use the encoder hidden"
    try:
        from sentence_transformers import SentenceTransformer, __version__
    except ImportError as error:
        raise UsageError(f"{named} needs {error.name}, which is not installed: {instead}") from error
    if int(__version__.partition(".")[0]) < _SAFE_MAJOR:
        raise UsageError(f"{named}: sentence-transformers {__version__} would run the model's code: {instead}")
    try:
        # Attention is the default of the class, not a package that the configuration names.
        safe = {"use_safetensors": True, "attn_implementation": None}
        loaded: Any = SentenceTransformer(model, trust_remote_code=False, model_kwargs=safe)
    except Exception as error:  # a model's class may raise anything
        reason = f"cannot be loaded ({' '.join(str(error).split())[:200]}): check its name"
        if "trust_remote_code" in str(error):  # what the package advises
            reason = "needs code in the model's files, which is not run: choose another"
        raise UsageError(f"{named}: {reason}") from error

    def encode(prompts: Sequence[Prompt]) -> np.ndarray:
        texts = [prompt_text(prompt) for prompt in prompts]
        return _unit_rms(np.asarray(loaded.encode(texts, show_progress_bar=False), np.float32))

    return encode


def _unit_rms(vectors: np.ndarray) -> np.ndarray:
    """Scale rows (P, D) to a root mean square of 1, as float32; rows of zeros stay."""
    vectors = np.asarray(vectors, np.float32)
    size = np.sqrt(np.mean(vectors**2, axis=1, keepdims=True))
    return vectors / np.where(size > 0, size, np.float32(1))
