"""The forward pass: embedding, scan over the layers, final norm, logits."""

from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp

from jcrosslora.decoder.adapters import AppliedAdapter
from jcrosslora.decoder.attention import EMPTY, KVCache, append_positions, growths, last_keys, of_sequences, rotations
from jcrosslora.decoder.block import layer_forward
from jcrosslora.decoder.layer import MODULE_OUTPUT, Context, LayerCapture, LayerWeights
from jcrosslora.decoder.layer_inputs import layer_inputs
from jcrosslora.decoder.layer_stack import scan_layers
from jcrosslora.decoder.ops import layer_norm, linear, rms_norm, rows_at, soft_cap
from jcrosslora.decoder.params import Params
from jcrosslora.decoder.settings import DecoderSettings
from jcrosslora.errors import UsageError

CAPTURES = frozenset({"inputs", "outputs", "residual"})
Reduce = Callable[[LayerCapture], Any]


@flax.struct.dataclass
class Output:
    """The result of a forward pass.

    Attributes:
        hidden: (B, T, H), hidden states after the final norm, the input of `logits`; undefined at padding.
        captured: the requested captures: "inputs" -> site -> (L, B, T, I); "outputs" -> role -> (L, B, T, O), both of
            the L layers that have them; "residual" -> (layers + 1, B, T, H), the embedding first.
        reduced: the results of `reduce`, with a first axis of layers on every leaf; of the entries of a dictionary, of
            just the layers that returned them. None without it.
    """

    hidden: jax.Array
    captured: dict[str, Any]
    reduced: Any


def forward(
    settings: DecoderSettings,
    params: Params,
    tokens: jax.Array,
    *,
    mask: jax.Array | None = None,
    adapter: AppliedAdapter | None = None,
    capture: frozenset[str] = frozenset(),
    reduce: Reduce | None = None,
    remat: bool = False,
) -> Output:
    """Run a model on token sequences. Under `jax.jit`, settings, capture, reduce and remat are static.

    Args:
        settings: from `settings_of`.
        params: from `load_params`.
        tokens: int32 (B, T), or (T,) for a batch of one.
        mask: bool, of the shape of tokens, False at padding on either side; None for no padding. Positions count the
            tokens that are not padding.
        adapter: applied unmerged in every module that it updates; `jax.vmap` over it shares the base.
        capture: names of `CAPTURES` to return for all layers; memory is L times that of one layer.
        reduce: called with the `LayerCapture` of each layer inside the scan; only its result is kept. It may close over
            arrays, such as the mask or the captures of another model.
        remat: recompute each layer in the backward pass; else the outputs of its linear modules are kept, and what lies
            between them is computed again.

    Raises:
        UsageError: `capture` has an unknown name.
    """
    if capture - CAPTURES:
        msg = f"capture {sorted(capture - CAPTURES)[0]!r} is unknown; use one of {', '.join(sorted(CAPTURES))}"
        raise UsageError(msg)
    tokens, mask = jnp.atleast_2d(tokens), None if mask is None else jnp.atleast_2d(mask)
    positions, keys = positions_of(tokens, mask)
    x, inputs = embed(settings, params, tokens)

    def keep(layer: LayerCapture) -> tuple[dict[str, Any], Any]:
        return {name: getattr(layer, name) for name in capture}, None if reduce is None else reduce(layer)

    context = context_of(settings, positions, keys, inputs=inputs)
    hidden, _, (captured, reduced) = _run_layers(settings, params, context, x, adapter, None, keep, remat=remat)
    if "residual" in capture:
        captured["residual"] = jnp.concatenate([x[None], captured["residual"]])
    return Output(hidden, captured, reduced)


def logits(settings: DecoderSettings, params: Params, hidden: jax.Array) -> jax.Array:
    """Return float32 (..., V) of hidden states (..., H) after the final norm, with scale and soft cap applied."""
    return finish_logits(settings, linear(hidden, head_of(params)), params.head_bias)


def finish_logits(settings: DecoderSettings, products: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Make logits of the products of hidden states and rows of the head, given the bias of these rows."""
    products = products if bias is None else products + bias
    products = products if settings.logit_scale == 1.0 else products * settings.logit_scale
    return soft_cap(products, settings.final_soft_cap)


def head_of(params: Params) -> jax.Array:
    """Return the output head (V, H), which is the embedding in a tied model."""
    return params.embedding if params.head is None else params.head


def positions_of(tokens: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return int32 (B, T) positions of queries (at padding those of a neighbour) and of keys (-1 at padding)."""
    valid = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    chex.assert_equal_shape([tokens, valid])
    counted = jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1
    return jnp.maximum(counted, 0), jnp.where(valid, counted, EMPTY)


def _positions_behind(tokens: jax.Array, mask: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what `positions_of` does, of rows that go on behind `before`, int32 (B,), tokens."""
    queries, keys = positions_of(tokens, mask)
    return queries + before[:, None], jnp.where(keys < 0, keys, keys + before[:, None])


def context_of(
    settings: DecoderSettings,
    queries: jax.Array,
    keys: jax.Array,
    lengths: jax.Array | None = None,
    valid: jax.Array | None = None,
    inputs: jax.Array | None = None,
) -> Context:
    """Make what all layers share of positions as from `positions_of`; `lengths` as for `rotations`.

    `valid`, bool (B, T), is False at padding; None where the keys are of the same tokens as the queries. `inputs` are
    those of `layer_inputs`.
    """
    valid, ropes = keys >= 0 if valid is None else valid, settings.ropes
    return Context(queries, keys, valid, rotations(ropes, queries, lengths), growths(ropes, queries), inputs)


def embed(settings: DecoderSettings, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return the residual stream (B, T, H) before the first layer, and what `layer_inputs` makes of it."""
    # The scale is rounded to the dtype of the stream, as in the training of the Gemma models.
    x = rows_at(params.embedding, tokens).astype(params.stream_dtype)
    x = x if settings.embedding_scale == 1.0 else x * jnp.asarray(settings.embedding_scale, x.dtype)
    return x, layer_inputs(settings, params.layer_inputs, tokens, x)


def _run_layers(
    settings: DecoderSettings,
    params: Params,
    context: Context,
    x: jax.Array,
    adapter: AppliedAdapter | None,
    cache: KVCache | None,
    keep: Callable[[LayerCapture], Any] = lambda _: None,
    *,
    remat: bool = False,
) -> tuple[jax.Array, KVCache | None, Any]:
    """Scan the layers over embedded tokens x (B, T, H).

    Returns:
        Hidden states after the final norm, the cache with the new tokens, and the results of `keep` for all layers.
    """

    def run(carry: tuple[jax.Array, KVCache | None], layer: LayerWeights) -> tuple[Any, Any]:
        x, cache, captured = layer_forward(settings, layer, context, *carry)
        return (x, cache), keep(captured)

    cache = last_keys(settings, x) if cache is None else cache
    names = () if remat else (MODULE_OUTPUT,)
    step = jax.checkpoint(run, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*names))
    (x, cache), kept = scan_layers(settings, params, adapter, step, (x, cache))
    return _final_norm(settings, params, x), cache, kept


def _final_norm(settings: DecoderSettings, params: Params, x: jax.Array) -> jax.Array:
    if settings.layer_norm:
        return layer_norm(x, params.final_norm, params.final_norm_bias, settings.eps)
    return rms_norm(x, params.final_norm, settings.eps)


def extend_cache(
    settings: DecoderSettings,
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    positions: tuple[jax.Array, jax.Array],
    adapter: AppliedAdapter | None,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Run tokens (B, T) after those in the cache; positions as from `positions_of`, `lengths` as for `rotations`.

    Returns:
        (B, T, H) hidden states after the final norm, and the cache with the tokens appended.
    """
    queries, keys = positions
    cache = append_positions(cache, keys)
    x, inputs = embed(settings, params, tokens)
    context = context_of(settings, queries, cache.positions, lengths, keys >= 0, inputs)
    hidden, grown, _ = _run_layers(settings, params, context, x, adapter, cache)
    assert grown is not None
    filled = grown.filled + tokens.shape[1]
    return hidden, grown.replace(filled=filled)  # pyright: ignore[reportAttributeAccessIssue]


def extend_behind(
    settings: DecoderSettings,
    params: Params,
    cache: KVCache,
    beginnings: tuple[jax.Array, jax.Array],
    owners: jax.Array,
    texts: tuple[jax.Array, jax.Array],
    adapter: AppliedAdapter | None,
) -> tuple[jax.Array, KVCache]:
    """Run beginnings, each once, and behind them the texts that go on from them.

    Args:
        settings: of the model.
        params: its weights.
        cache: empty, of G sequences.
        beginnings: int32 (G, P) tokens and their mask, bool, False at padding on either side.
        owners: int32 (B,), the beginning in front of each text.
        texts: int32 (B, T) tokens and their mask, likewise.
        adapter: or None.

    Returns:
        (B, T, H) hidden states of the texts after the final norm, and the cache of B sequences with both.
    """
    before, own = (jnp.sum(mask, axis=-1, dtype=jnp.int32) for _, mask in (beginnings, texts))
    # The rotations of some bases depend on the length of a text: a beginning goes by its longest text.
    longest = before + jnp.zeros_like(before).at[owners].max(own)
    _, cache = extend_cache(settings, params, cache, beginnings[0], positions_of(*beginnings), adapter, longest)
    cache, places = of_sequences(cache, owners), _positions_behind(*texts, before[owners])
    return extend_cache(settings, params, cache, texts[0], places, adapter, before[owners] + own)
