"""Activations of both bases on the same text: probe texts to batches, batches to moments, moments to evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import INPUT_SITES
from jcrosslora.maps.evidence.records import Activations, Evidence, EvidenceKind
from jcrosslora.maps.evidence.request import AddEvidence, EvidenceRequest, ModuleStack, pairs_as_json
from jcrosslora.utils.cost import Cost

if TYPE_CHECKING:
    from jcrosslora.evaluate.probes import ProbeBatch, Probes
    from jcrosslora.maps.evidence.moments import CrossMoments

# Tokens per probe text, and texts per batch. A batch holds the activations of all layers at the matched positions.
PROBE_LENGTH, PROBE_BATCH = 128, 4
# Passes of the target that take as long as the products of activations of both bases (for two bases of width 600 there
# are 12 million numbers for each layer of 3.5 million parameters), and as the grams of each.
_MOMENTS, _GRAMS = 4, 8
# Share of the time of a square matrix's SVD that its eigendecomposition takes (0.3 to 0.9 for sides of 256 to 2048).
_EIGEN = 0.4


def batch_probes(
    source: BaseModel, target: BaseModel, probes: Probes | None, *, seed: int = 0
) -> tuple[Probes, list[ProbeBatch]]:
    """Tokenise probe texts for both bases.

    Without `probes` the source base writes the texts.

    Returns:
        The probes with the number of matched positions filled in, and their batches.

    Raises:
        UsageError: no text has a position that matches.
        CheckpointError: a base or its tokenizer cannot be read.
    """
    # Imported here: methods that look at weights alone need neither tokenizers nor the decoder.
    from jcrosslora.checkpoint.tokenizer import load_tokenizer
    from jcrosslora.evaluate.probes import count_positions, probe_batches, written_probes

    if probes is None:
        probes = written_probes(source, seed=seed)
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    batches = probe_batches(probes.texts, tokenizers, length=PROBE_LENGTH, batch=PROBE_BATCH)
    return dataclasses.replace(probes, positions=count_positions(batches)), batches


def collect_activations(request: EvidenceRequest) -> AddEvidence:
    """Run both bases over the probe texts, and sum the moments of the activations."""
    from jcrosslora.maps.evidence.moments import cross_moments

    source, target = request.pair.source, request.pair.target
    roles = {pair.role for pair in request.modules}
    grams = EvidenceKind.ACTIVATION_GRAMS in request.kinds
    moments = cross_moments(source, target, request.batches, request.layers, roles, grams=grams)

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        layers = [target.modules[pair.target].layer for pair in stack.pairs]
        return dataclasses.replace(evidence, activations=_stack_activations(moments, stack, layers))

    return add


def activations_cost(request: EvidenceRequest, texts: int) -> Cost:
    """Count the passes of both bases, the products, and the SVDs of the maps.

    Of each pair of modules the moments of the outputs and of the inputs are decomposed, and with second moments those
    of each side.
    """
    from jcrosslora.evaluate.probes.writing import PROBE_TOKENS

    tokens, grams = texts * PROBE_TOKENS, EvidenceKind.ACTIVATION_GRAMS in request.kinds
    products = _MOMENTS + (_GRAMS if grams else 0)
    svd = 0.0
    for src, tgt in request.shapes:
        svd += sum(one * two * min(one, two) for one, two in zip(src, tgt, strict=True))
        svd += _EIGEN * sum(side**3 for side in (*src, *tgt)) if grams else 0
    return Cost(source=tokens, target=(1 + products) * tokens, svd=svd, precise=True)


def activations_key(request: EvidenceRequest) -> Any:
    """Return the texts and all modules: one program sums for all modules, so each can change the last digits."""
    texts = None if request.probes is None else request.probes.digest()
    return texts, EvidenceKind.ACTIVATION_GRAMS in request.kinds, pairs_as_json(request.modules)


def _stack_activations(moments: CrossMoments, stack: ModuleStack, layers: Sequence[int]) -> Activations:
    """Stack the moments of the modules of a stack, which are in these target layers."""
    roles = [pair.role for pair in stack.pairs]
    sites = [INPUT_SITES[role] for role in roles]

    def stacked(sums: Mapping[str, Any], names: list[str]) -> Any:
        rows = [jax.tree.map(lambda x, at=at: x[at], sums[name]) for name, at in zip(names, layers, strict=True)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack.filled(rows))

    return Activations(
        stacked(moments.inputs, sites),
        stacked(moments.outputs, roles),
        stacked(moments.input_squares, sites),
        stacked(moments.output_squares, roles),
        None if moments.input_grams is None else stacked(moments.input_grams, sites),
        None if moments.output_grams is None else stacked(moments.output_grams, roles),
    )
