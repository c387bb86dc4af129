"""Activations of both bases on the same text: probe texts to batches, batches to moments, moments to evidence.

Only sums of products of matched activations are kept, in float32. This is accurate enough: the rounding error of an
entry is relative to the sizes of its two dimensions (1e-7 of sqrt(sum x_i^2 sum y_j^2) over 28,000 positions), so
scaling the dimensions before the products gains nothing. But an SVD or a solve has errors relative to the largest
singular value, and would lose small dimensions. So the sums must be scaled first; for this, `Activations` holds the sum
of squares of each dimension. The sums do lose accuracy in a direction next to a much larger one that is spread over
all dimensions, such as a mean: 0.5 % for a direction that is a thousand times smaller, growing with the square of the
ratio. `tests/test_moments_float64.py` measures these figures.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.checkpoint import BaseModel, load_tokenizer
from jcrosslora.decoder import INPUT_SITES, DecoderSettings, LayerCapture, Model, forward, load_model
from jcrosslora.evaluate.probes import PROBE_TOKENS, ProbeBatch, Probes, count_positions, probe_batches, written_probes
from jcrosslora.linalg import dot
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.evidence import Activations, AddEvidence, Evidence, EvidenceKind, ModuleStack, pairs_as_json
from jcrosslora.maps.method import Plan
from jcrosslora.relation.pairing import Pair
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.picking import pick_evenly
from jcrosslora.utils.progress import each

# Tokens per probe text, and texts per batch. A batch holds the activations of all layers at the matched positions.
PROBE_LENGTH, PROBE_BATCH = 128, 4
# Passes of the target that take as long as the products between the activations of both bases (for two bases of width
# 600, 12 million numbers for each layer of 3.5 million parameters), and as the grams of each base.
_MOMENTS, _GRAMS = 4, 8
# Positions at which the inputs of modules are kept.
_INPUTS = 2048
# Time of an eigendecomposition over that of an SVD of the same square matrix (0.3 to 0.9 for sides of 256 to 2048).
_EIGEN = 0.4
# Activations of one base at the positions of a batch: inputs by site and outputs by role, (L, P, width) each.
Rows = tuple[dict[str, jax.Array], dict[str, jax.Array]]
_Two = tuple[jax.Array, jax.Array]


def batch_probes(pair: BasePair, probes: Probes | None, *, seed: int = 0) -> tuple[Probes, list[ProbeBatch]]:
    """Tokenise probe texts for both bases.

    Without `probes` the source base writes the texts. The returned probes have the number of matched positions. Raises
    UsageError if no text has a matching position, and CheckpointError if a base or its tokenizer cannot be read.
    """
    if probes is None:
        probes = written_probes(pair.source, seed=seed)
    tokenizers = load_tokenizer(pair.source), load_tokenizer(pair.target)
    batches = probe_batches(probes.texts, tokenizers, length=PROBE_LENGTH, batch=PROBE_BATCH)
    return dataclasses.replace(probes, positions=count_positions(batches)), batches


def collect_activations(plan: Plan) -> AddEvidence:
    """Run both bases over the probe texts, and sum the moments of the activations."""
    roles = {pair.role for pair in plan.modules}
    grams = EvidenceKind.ACTIVATION_GRAMS in plan.kinds
    moments = cross_moments(plan.pair, plan.batches, plan.layers, roles, grams=grams)

    def of_module(pair: Pair) -> Activations:
        module = plan.pair.target.modules[pair.target]
        site, role, layer = INPUT_SITES[module.role], module.role, module.layer
        sums = {name: one and one[site if name.startswith("input") else role] for name, one in vars(moments).items()}
        return jax.tree.map(lambda x: x[layer], Activations(**sums))

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        rows = stack.filled([of_module(pair) for pair in stack.pairs])
        return dataclasses.replace(evidence, activations=jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))

    return add


def activations_cost(plan: Plan, texts: int) -> Cost:
    """Count the passes of both bases, the products, and the decompositions of each pair's moments (and grams)."""
    tokens, grams = texts * PROBE_TOKENS, EvidenceKind.ACTIVATION_GRAMS in plan.kinds
    products = _MOMENTS + (_GRAMS if grams else 0)
    svd = 0.0
    for src, tgt in map(plan.shapes, plan.modules):
        svd += sum(one * two * min(one, two) for one, two in zip(src, tgt, strict=True))
        svd += _EIGEN * sum(side**3 for side in (*src, *tgt)) if grams else 0
    return Cost(source=tokens, target=(1 + products) * tokens, svd=svd, precise=True)


def activations_key(plan: Plan) -> Any:
    """Return the digest of the texts and all modules: one program sums for all, so each can change the last digits."""
    texts = None if plan.probes is None else plan.probes.digest()
    return texts, EvidenceKind.ACTIVATION_GRAMS in plan.kinds, pairs_as_json(plan.modules)


def cross_moments(
    pair: BasePair,
    batches: Sequence[ProbeBatch],
    layers: Sequence[int | None],
    roles: Collection[str],
    *,
    grams: bool = False,
) -> Activations:
    """Run both bases over the probes and sum the cross-moments of the inputs and outputs of paired modules.

    `layers` has the source layer that feeds each target layer, or None (then the moments are meaningless). Nothing is
    centred. Each field of the result is a dict from input site (see `INPUT_SITES`) or output role to an array of
    `Activations`, with a leading axis for the target's L layers.

    Memory: the layers of both bases as float32, the moments once (12 million numbers a layer for two models of width
    600, 26 million more with the grams), and the activations of all layers at the matched positions of one batch. Of
    the embeddings only the rows of occurring tokens are kept, and the output heads are dropped; both are whole only
    while a base is read.

    Raises CheckpointError if weights cannot be read, or the decoder does not know a model.
    """
    wanted = tuple(sorted(roles))
    read_src = _reader(pair.source, [batch.tokens_src for batch in batches], wanted)
    read_tgt = _reader(pair.target, [batch.tokens_tgt for batch in batches], wanted)
    feeders = jnp.asarray([0 if layer is None else layer for layer in layers], jnp.int32)
    totals = None
    for batch in each(batches, "collect activations", "batches"):
        src = read_src(batch.tokens_src, batch.mask_src, batch.at_src, batch.valid)
        tgt = read_tgt(batch.tokens_tgt, batch.mask_tgt, batch.at_tgt, batch.valid)
        totals = zero_moments(src, tgt, grams=grams) if totals is None else totals
        # Wait for each batch, so that memory holds the activations of only one.
        totals = jax.block_until_ready(add_rows(totals, src, tgt, feeders))
        del src, tgt
    assert totals is not None
    return totals


def zero_moments(src: Rows, tgt: Rows, *, grams: bool = False) -> Activations:
    """Return zeros as the first totals of `add_rows`, for rows shaped like `src` and `tgt`."""
    layers = jax.tree.leaves(tgt)[0].shape[0]
    one = jax.eval_shape(lambda rows: _of_layer(jax.tree.map(lambda x: x[0], rows), grams), (src, tgt))
    return jax.tree.map(lambda x: jnp.zeros((layers, *x.shape)), one)


@partial(jax.jit, donate_argnums=0)
def add_rows(totals: Activations, src: Rows, tgt: Rows, layers: jax.Array) -> Activations:
    """Add the products of P positions to the moments. The buffers of `totals` are donated to the result.

    Args:
        src: rows of the source, float32 (L_src, P, width), zero where not valid; `tgt` (L, P, width) are the target's.
        layers: int32 (L,), the source layer that feeds each target layer.
    """

    # Add to the totals in place, layer by layer: a scan would need memory for a second copy of its results.
    def one(layer: jax.Array, totals: Activations) -> Activations:
        rows = jax.tree.map(lambda x: x[layers[layer]], src), jax.tree.map(lambda y: y[layer], tgt)
        sums = _of_layer(rows, totals.input_grams is not None)
        return jax.tree.map(lambda total, x: total.at[layer].add(x), totals, sums)

    return lax.fori_loop(0, len(layers), one, totals)


def _of_layer(rows: tuple[Rows, Rows], grams: bool) -> Activations:
    """Sum the products of the rows (P, width) of one layer of both bases."""
    src, tgt = rows

    def squares(x: jax.Array, y: jax.Array) -> _Two:
        return jnp.sum(x**2, axis=0), jnp.sum(y**2, axis=0)

    def own(x: jax.Array, y: jax.Array) -> _Two:
        return dot(x.T, x), dot(y.T, y)

    inputs, outputs = jax.tree.map(lambda x, y: dot(x.T, y), src, tgt)
    input_squares, output_squares = jax.tree.map(squares, src, tgt)
    input_grams, output_grams = jax.tree.map(own, src, tgt) if grams else (None, None)
    return Activations(inputs, outputs, input_squares, output_squares, input_grams, output_grams)


def inputs_cost(texts: int) -> Cost:
    """Count the source's pass over the texts that `input_rows` reads."""
    return Cost(source=min(texts * PROBE_TOKENS, _INPUTS), precise=True)


def input_rows(base: BaseModel, batches: Sequence[ProbeBatch]) -> Callable[[str], jax.Array]:
    """Run a source base on evenly spaced batches that have about 2,048 matched positions.

    Memory: the inputs of all layers at these positions, float32.

    Returns a function from a module's name to its inputs (N, I), with rows of zeros for padding. Raises CheckpointError
    if weights cannot be read, or the decoder does not know the model.
    """
    positions = sum(int(batch.valid.sum()) for batch in batches)
    some = pick_evenly(batches, -(-_INPUTS * len(batches) // positions))
    read = _reader(base, [batch.tokens_src for batch in some], tuple(sorted(base.architecture.role_shapes)))
    found: dict[str, list[jax.Array]] = {}
    for batch in each(some, "collect inputs", "batches"):
        for site, rows in read(batch.tokens_src, batch.mask_src, batch.at_src, batch.valid)[0].items():
            found.setdefault(site, []).append(rows)
    sites = {site: jnp.concatenate(found.pop(site), axis=1) for site in list(found)}

    def inputs(name: str) -> jax.Array:
        module = base.modules[name]
        return sites[INPUT_SITES[module.role]][module.layer]

    return inputs


def _reader(base: BaseModel, tokens: Sequence[np.ndarray], roles: tuple[str, ...]) -> Callable[..., Rows]:
    """Return a function from a batch's tokens, mask, positions and validity to the activations at the positions."""
    kept = np.unique(np.concatenate([batch.ravel() for batch in tokens]))
    # An embedding may be larger than all layers together; only the rows of these tokens are looked up.
    model = jax.block_until_ready(load_model(base).of_tokens(kept))

    def read(tokens: np.ndarray, mask: np.ndarray, at: np.ndarray, valid: np.ndarray) -> Rows:
        places = np.searchsorted(kept, tokens).astype(np.int32)
        text, matched = (jnp.asarray(places), jnp.asarray(mask)), (jnp.asarray(at), jnp.asarray(valid))
        return _rows(model, roles, text, matched)

    return read


@partial(jax.jit, static_argnames="roles")
def _rows(model: Model, roles: tuple[str, ...], text: _Two, matched: _Two) -> Rows:
    (tokens, mask), (positions, valid) = text, matched
    keep = valid.astype(jnp.float32)[:, None]

    def take(x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])[positions].astype(jnp.float32) * keep

    def reduce(seen: LayerCapture) -> Rows:
        sites = sorted({INPUT_SITES[role] for role in roles})
        read = {site: take(seen.inputs[site]) for site in sites if site in seen.inputs}
        return read, {role: take(seen.outputs[role]) for role in roles if role in seen.outputs}

    read, wrote = forward(model, tokens, mask=mask, reduce=reduce).reduced
    by_site = {INPUT_SITES[role]: role for role in roles}
    return (
        {site: _in_all_layers(model.settings, by_site[site], x) for site, x in read.items()},
        {role: _in_all_layers(model.settings, role, x) for role, x in wrote.items()},
    )


def _in_all_layers(settings: DecoderSettings, role: str, rows: jax.Array) -> jax.Array:
    """Return (L, P, width), from the rows of the layers that have a role, with zeros for other layers."""
    held = settings.layers_with(role)
    if len(held) == settings.layers:
        return rows
    return jnp.zeros((settings.layers, *rows.shape[1:])).at[jnp.asarray(held)].set(rows)
