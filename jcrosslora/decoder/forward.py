"""The forward pass (embedding, scan over the layers, final norm, logits), and log-probabilities in chunks."""

import math
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.architectures.architecture import layer_forward
from jcrosslora.architectures.blocks import layer_inputs
from jcrosslora.architectures.ops import layer_norm, linear, rms_norm, rows_at, soft_cap
from jcrosslora.architectures.ropes import growths, rotations
from jcrosslora.architectures.run import (
    MODULE_OUTPUT,
    Context,
    KVCache,
    LayerCapture,
    LayerWeights,
    append_positions,
    of_sequences,
)
from jcrosslora.architectures.settings import DecoderSettings, last_keys
from jcrosslora.decoder.layer_stack import scan_layers
from jcrosslora.decoder.layout import Layout
from jcrosslora.decoder.model import Model
from jcrosslora.errors import UsageError

CAPTURES = frozenset({"inputs", "outputs", "residual"})
Reduce = Callable[[LayerCapture], Any]


@flax.struct.dataclass
class Output:
    """The result of a forward pass.

    Attributes:
        hidden: (B, T, H), hidden states after the final norm, the input of `logits`; undefined at padding.
        captured: the requested captures: "inputs" -> site -> (L, B, T, I); "outputs" -> role -> (L, B, T, O), both for
            the L layers that have them; "residual" -> (layers + 1, B, T, H), the embedding first.
        reduced: the results of `reduce`, with a first axis of layers on every leaf; a dictionary entry covers only the
            layers that returned it. None without `reduce`.
    """

    hidden: jax.Array
    captured: dict[str, Any]
    reduced: Any


def forward(
    model: Model,
    tokens: jax.Array,
    *,
    mask: jax.Array | None = None,
    layout: Layout | None = None,
    capture: frozenset[str] = frozenset(),
    reduce: Reduce | None = None,
    remat: bool = False,
) -> Output:
    """Run a model on token sequences. Under `jax.jit`, capture, reduce and remat are static.

    Args:
        model: from `load_model`, with an adapter or without.
        tokens: int32 (B, T), or (T,) for a batch of one; the mask has the same shape.
        mask: False at padding on either side; None for no padding. Positions count the tokens that are not padding.
        layout: replaces the mask for rows that hold several texts; the model must not be recurrent.
        capture: names of `CAPTURES` to return for all layers; memory is L times that of one layer.
        reduce: called with the `LayerCapture` of each layer inside the scan; only its result is kept. It may close over
            arrays, such as the mask or the captures of another model.
        remat: recompute each whole layer in the backward pass; otherwise the outputs of its linear modules are kept,
            and only the operations between them are recomputed.

    Raises:
        UsageError: `capture` has an unknown name.
    """
    if capture - CAPTURES:
        msg = f"capture {sorted(capture - CAPTURES)[0]!r} is unknown; use one of {', '.join(sorted(CAPTURES))}"
        raise UsageError(msg)
    tokens, mask = jnp.atleast_2d(tokens), None if mask is None else jnp.atleast_2d(mask)
    if layout is None:
        layout = Layout.of(jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool))
    chex.assert_equal_shape([tokens, layout.positions])
    x, inputs = embed(model, tokens)

    def keep(layer: LayerCapture) -> tuple[dict[str, Any], Any]:
        return {name: getattr(layer, name) for name in capture}, None if reduce is None else reduce(layer)

    context = context_of(model.settings, layout, inputs)
    hidden, _, (captured, reduced) = _run_layers(model, context, x, None, keep, remat=remat)
    if "residual" in capture:
        captured["residual"] = jnp.concatenate([x[None], captured["residual"]])
    return Output(hidden, captured, reduced)


def logits(model: Model, hidden: jax.Array) -> jax.Array:
    """Return logits float32 (..., V) of hidden states (..., H) after the final norm, with scale and soft cap."""
    params = model.params
    return finish_logits(model.settings, linear(hidden, params.output_head), params.head_bias)


def finish_logits(settings: DecoderSettings, products: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Add the bias, scale and soft cap to the products of hidden states and rows of the head."""
    products = products if bias is None else products + bias
    products = products if settings.logit_scale == 1.0 else products * settings.logit_scale
    return soft_cap(products, settings.final_soft_cap)


def context_of(
    settings: DecoderSettings, layout: Layout, inputs: jax.Array | None = None, keys: jax.Array | None = None
) -> Context:
    """Build the context that all layers share for tokens (B, T); `inputs` come from `layer_inputs`.

    `keys` are the positions of the keys, int32 (B, S); None if keys and queries are the same tokens. If a row has
    several texts, its tokens are the last T of the keys.
    """
    own, ropes = layout.positions, settings.ropes
    queries, keys = jnp.maximum(own, 0), own if keys is None else keys
    turned, grown = rotations(ropes, queries, layout.lengths), growths(ropes, queries)
    return Context(queries, keys, own >= 0, turned, grown, inputs, layout.seen(keys.shape[1] - own.shape[1]))


def embed(model: Model, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return the residual stream (B, T, H) before the first layer, and the result of `layer_inputs`."""
    settings, params = model.settings, model.params
    # The scale is rounded to the dtype of the stream, as in the training of the Gemma models.
    x = rows_at(params.embedding, tokens).astype(params.stream_dtype)
    x = x if settings.embedding_scale == 1.0 else x * jnp.asarray(settings.embedding_scale, x.dtype)
    return x, layer_inputs(params.layer_inputs, tokens, x, settings.eps)


def _run_layers(
    model: Model,
    context: Context,
    x: jax.Array,
    cache: KVCache | None,
    keep: Callable[[LayerCapture], Any] = lambda _: None,
    *,
    remat: bool = False,
) -> tuple[jax.Array, KVCache | None, Any]:
    """Scan the layers over embedded tokens x (B, T, H).

    Returns:
        Hidden states after the final norm, the cache with the new tokens, and the results of `keep` for all layers.
    """
    settings = model.settings

    def run(carry: tuple[jax.Array, KVCache | None], layer: LayerWeights) -> tuple[Any, Any]:
        x, cache, captured = layer_forward(settings, layer, context, *carry)
        return (x, cache), keep(captured)

    cache = last_keys(settings, x) if cache is None else cache
    names = () if remat else (MODULE_OUTPUT,)
    step = jax.checkpoint(run, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*names))
    (x, cache), kept = scan_layers(settings, model.params, model.adapter, step, (x, cache))
    return _final_norm(model, x), cache, kept


def _final_norm(model: Model, x: jax.Array) -> jax.Array:
    settings, params = model.settings, model.params
    if settings.layer_norm:
        return layer_norm(x, params.final_norm, params.final_norm_bias, settings.eps)
    return rms_norm(x, params.final_norm, settings.eps)


def extend_cache(model: Model, cache: KVCache, tokens: jax.Array, layout: Layout) -> tuple[jax.Array, KVCache]:
    """Run tokens (B, T) after those in the cache; if a row has several texts, the tokens must fill up the cache.

    Returns:
        (B, T, H) hidden states after the final norm, and the cache with the tokens appended.
    """
    cache = append_positions(cache, layout.positions)
    x, inputs = embed(model, tokens)
    context = context_of(model.settings, layout, inputs, cache.positions)
    hidden, grown, _ = _run_layers(model, context, x, cache)
    assert grown is not None
    filled = grown.filled + tokens.shape[1]
    return hidden, grown.replace(filled=filled)  # pyright: ignore[reportAttributeAccessIssue]


def extend_behind(
    model: Model,
    cache: KVCache,
    beginnings: tuple[jax.Array, jax.Array],
    owners: jax.Array,
    texts: tuple[jax.Array, Layout],
) -> tuple[jax.Array, KVCache]:
    """Run each shared prefix once and then the texts that continue them, from an empty cache of G sequences.

    `beginnings` are the prefixes, int32 (G, P), with a bool mask that is False at padding on either side. `texts` are
    tokens int32 (B, T) without their prefixes, with a layout. `owners`, int32 (B,), is the prefix of each row.

    Returns:
        (B, T, H) hidden states of the texts after the final norm, and the cache of B sequences with both.
    """
    (first, mask), (tokens, layout) = beginnings, texts
    before = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    layout = layout.behind(before[owners])
    # The rotations of some bases depend on the length of a text: a prefix uses the length of its longest text.
    assert layout.lengths is not None
    longest = before.at[owners].max(jnp.max(layout.lengths, axis=-1))
    _, cache = extend_cache(model, cache, first, Layout.of(mask)._replace(lengths=longest[:, None]))
    return extend_cache(model, of_sequences(cache, owners), tokens, layout)


def target_log_probs(model: Model, hidden: jax.Array, targets: jax.Array, *, chunk: int = 128) -> jax.Array:
    """Return log p(target) at every position, float32 (B, T), in nats.

    Memory is `chunk` rows of V logits, also in the backward pass, which recomputes them; under `jax.vmap` over N
    adapters it is N times that.

    Hidden states are (B, T, H), `forward(...).hidden`; targets are int32 (B, T), the token after each position; `chunk`
    positions are computed at a time (static).
    """
    params = model.params
    head = params.output_head

    def log_probs(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, wanted = part
        # Computed apart, because the gradient of a gather from all logits is a scatter into V columns, which takes
        # twice the time.
        chosen = jnp.sum(states.astype(jnp.float32) * head[wanted].astype(jnp.float32), axis=-1)
        chosen = finish_logits(model.settings, chosen, None if params.head_bias is None else params.head_bias[wanted])
        scores = logits(model, states)
        return chosen - jax.nn.logsumexp(scores, axis=-1)

    return map_positions(log_probs, (hidden, targets), targets.shape, chunk)


def map_positions(
    function: Callable[..., Any], arrays: tuple[jax.Array, ...], shape: tuple[int, ...], chunk: int
) -> Any:
    """Apply a function to chunks of positions of a shape, e.g. (B, T); the backward pass recomputes each chunk.

    Args:
        function: takes a tuple with (chunk, ...) of each array, and returns a tree of arrays (chunk,).
        arrays: each has `shape` followed by any feature axes.

    Returns:
        The tree of `function`, with leaves of `shape`.
    """
    count = math.prod(shape)
    size = min(chunk, count)
    padding = -count % size

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *x.shape[len(shape) :])
        return jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])

    # Inside a loop, checkpoint needs no protection against common-subexpression elimination.
    found = lax.map(jax.checkpoint(function, prevent_cse=False), tuple(map(cut, arrays)))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(shape), found)


@flax.struct.dataclass
class Divergence:
    """Predictions of one model from hidden states a and b, float32 for each position, in nats.

    Attributes:
        kl: KL(a || b) over the whole vocabulary.
        log_probs_a: log p_a(target).
        log_probs_b: log p_b(target).
    """

    kl: jax.Array
    log_probs_a: jax.Array
    log_probs_b: jax.Array


def divergence(
    model: Model, hidden_a: jax.Array, hidden_b: jax.Array, targets: jax.Array, *, chunk: int = 64
) -> Divergence:
    """Compare the predictions from two hidden states at every position, through the same head.

    Memory is a few times `chunk` rows of V numbers, also in the backward pass, which recomputes the logits.

    Hidden states are (..., H), `forward(...).hidden` of two runs over the same tokens, e.g. without and with an
    adapter, which never changes the head. Targets are int32 (...), a token for each position, e.g. the next one;
    `chunk` positions are computed at a time (static).
    """

    def compare(part: tuple[jax.Array, jax.Array, jax.Array]) -> Divergence:
        states_a, states_b, wanted = part
        log_a, log_b = (jax.nn.log_softmax(logits(model, states), -1) for states in (states_a, states_b))
        chosen = (jnp.take_along_axis(log, wanted[:, None], axis=-1)[:, 0] for log in (log_a, log_b))
        return Divergence(_kl(log_a, log_b), *chosen)

    return map_positions(compare, (hidden_a, hidden_b, targets), targets.shape, chunk)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    # The sums of p_a and of p_b are both 1. Adding their difference makes every term non-negative. A rounding error c
    # of a normaliser, which is larger than the KL of two nearly equal states, then enters as c^2 instead of c.
    p_a, p_b = jnp.exp(log_a), jnp.exp(log_b)
    return jnp.sum(p_a * (log_a - log_b) - p_a + p_b, axis=-1)
