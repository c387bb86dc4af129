"""The evidence providers by kind, with the code of the short ones: all but the provider of activations.

An alignment requests kinds of evidence and does not know the method. Truncated SVDs of a base are cached, and reused
for every pair with this base.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.checkpoint.weight_stacks import load_on_host, load_stack
from jcrosslora.evaluate.probes import check_seed
from jcrosslora.linalg import TruncatedSVD, decompose, shard, stack_rows
from jcrosslora.maps.activations import activations_cost, activations_key, collect_activations
from jcrosslora.maps.evidence import AddEvidence, ChannelPair, Evidence, EvidenceKind, ModuleStack, Selection
from jcrosslora.maps.method import Plan
from jcrosslora.relation import ChannelScales
from jcrosslora.utils.cache import Cache
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.digests import digest_of, numerics_key

_FIELDS = tuple(field.name for field in dataclasses.fields(TruncatedSVD))
_KIND = "factors"
# The arrays of one module's decomposition, and the kernel that computed it.
_Row = tuple[dict[str, np.ndarray], str]
# Hex digits of each half of a key: the first half digests weights, rank and numerics, the second the module names.
_DIGITS = 32


@dataclass(frozen=True)
class Provider:
    """How one kind of evidence is collected.

    Attributes:
        collect: collects what all modules share, and returns a function that adds the evidence of a stack of modules.
        reads_tokenizers: whether the evidence depends on the tokenizers too, not only on the weights.
        check: raises an error for a plan that cannot be carried out, before anything is computed.
        cost: counts the work for a number of probe texts, including the maps that are made from the evidence.
        cache_key: what the evidence depends on besides bases, rank and modules, as a JSON value; None if computing its
            maps is as fast as reading them from a cache.
    """

    collect: Callable[[Plan], AddEvidence]
    reads_tokenizers: bool = False
    check: Callable[[Plan], None] = lambda _: None
    cost: Callable[[Plan, int], Cost] = lambda *_: Cost()
    cache_key: Callable[[Plan], Any] | None = None


def providers_of(kinds: Iterable[EvidenceKind]) -> list[Provider]:
    """Return the providers of some kinds, in a fixed order; the kinds that have none are left out."""
    wanted = set(kinds)
    return [provider for kind, provider in PROVIDERS.items() if kind in wanted]


def evidence_cost(plan: Plan, texts: int) -> Cost:
    """Count the work for the evidence of a plan with a number of probe texts."""
    return sum((provider.cost(plan, texts) for provider in providers_of(plan.kinds)), Cost())


def collect_singular_vectors(plan: Plan) -> AddEvidence:
    """Return a function that adds the SVDs of a stack, from the cache where it has them."""
    pair, vectors = plan.pair, plan.single_vectors

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        sides = []
        for index, (base, side) in enumerate(zip(pair, (evidence.src, evidence.tgt), strict=True)):
            if pair.store is None:
                svd, kernels = decompose(side.weight, evidence.rank, vectors=vectors)
            else:
                cache = FactorCache(pair.store, base, pair.weights[index], evidence.rank, vectors=vectors)
                svd, kernels = cache.decompose(stack.names[index], side.weight)
            stack.kernels.extend(kernels[: len(stack.pairs)])
            sides.append(dataclasses.replace(side, svd=svd))
        return dataclasses.replace(evidence, src=sides[0], tgt=sides[1])

    return add


def singular_vectors_cost(plan: Plan, texts: int) -> Cost:
    """Count a decomposition of each matrix."""
    del texts
    sides = [shape for pair in plan.modules for shape in plan.shapes(pair)]
    return Cost(decomposed=tuple((shape, min(plan.rank, *shape), plan.single_vectors) for shape in sides))


class FactorCache:
    """Decomposes modules of one base, or reads decompositions that any pair with this base has cached.

    An entry holds the modules of one stack. The first half of its key finds it for modules of other stacks too: the
    factors do not depend on the stack on a CPU, and only by rounding if an accelerator decomposes all matrices at once.
    """

    def __init__(self, store: Cache, base: BaseModel, weights: str, rank: int, *, vectors: bool) -> None:
        """Open the entries of rank R; `weights` is the digest of the base's weights, `vectors` as for `decompose`."""
        self._store, self._base, self._rank, self._vectors = store, base, rank, vectors
        self._scope = digest_of(weights, rank, vectors, numerics_key(), _FIELDS)[:_DIGITS]

    def decompose(self, names: Sequence[str], stack: Any) -> tuple[TruncatedSVD, Sequence[str]]:
        """Return the truncated SVDs of a stack (L', O, I) of L modules, and the kernel that computed each of the L."""
        found = self._find(names)
        missing = [name for name in names if name not in found]
        if missing:
            load = load_on_host if isinstance(stack, np.ndarray) else load_stack
            fresh = stack if len(missing) == len(names) else load(self._base, missing)
            svd, kernels = decompose(fresh, self._rank, vectors=self._vectors)
            self._keep(missing, svd, kernels)
            if fresh is stack:
                return svd, kernels[: len(names)]
            found |= _rows(missing, {field: np.asarray(getattr(svd, field)) for field in _FIELDS}, kernels)
        rows = [found[name][0] for name in names]
        rows += rows[-1:] * (stack.shape[0] - len(names))
        fields: list[Any] = [stack_rows([row[field] for row in rows]) for field in _FIELDS]
        svd = TruncatedSVD(*(fields if isinstance(stack, np.ndarray) else map(shard, fields)))
        return svd, [found[name][1] for name in names]

    def _find(self, names: Sequence[str]) -> dict[str, _Row]:
        own = self._key(names)
        found: dict[str, _Row] = {}
        # Try the entry of the same stack first: it makes the others unnecessary.
        for key in [own, *(key for key in self._store.keys(_KIND, self._scope) if key != own)]:
            facts = self._store.facts(_KIND, key)
            if facts is not None and set(facts["modules"]) & (set(names) - found.keys()):
                loaded = self._store.load(_KIND, key)
                if loaded is not None:
                    rows = _rows(facts["modules"], loaded.arrays, facts["kernels"])
                    found |= {name: rows[name] for name in names if name in rows and name not in found}
            if len(found) == len(names):
                break
        return found

    def _keep(self, names: Sequence[str], svd: TruncatedSVD, kernels: Sequence[str]) -> None:
        arrays = {field: np.asarray(getattr(svd, field)) for field in _FIELDS}
        if len(svd.u) > len(names):
            arrays = {field: array[: len(names)] for field, array in arrays.items()}
        facts = {"modules": list(names), "kernels": list(kernels[: len(names)])}
        what = f"rank {self._rank}, {public_name(self._base.name) or self._base.name}, {describe(names)}"
        self._store.save(_KIND, self._key(names), what, arrays, facts)

    def _key(self, names: Sequence[str]) -> str:
        return f"{self._scope}-{digest_of(list(names))[:_DIGITS]}"


def describe(names: Sequence[str]) -> str:
    """Describe modules by their number and their roles."""
    roles = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return f"{len(names)} x {' '.join(roles)}"


def _rows(names: Sequence[str], arrays: Mapping[str, np.ndarray], kernels: Sequence[str]) -> dict[str, _Row]:
    return {name: ({field: arrays[field][row] for field in _FIELDS}, kernels[row]) for row, name in enumerate(names)}


def _collect_vocabulary(plan: Plan) -> AddEvidence:
    """Collect the moments of the shared vocabulary once for the pair; None if the bases share no token.

    Methods that use the vocabulary for the signs of singular vectors work without it too.
    """
    vocabulary = plan.pair.vocabulary[0] if plan.pair.shared_tokens[0] else None
    return lambda evidence, _: dataclasses.replace(evidence, vocabulary=vocabulary)


def _collect_keys(plan: Plan) -> AddEvidence:
    """Derive each PRNG key from the seed and the name of the target module alone, not from the other modules."""
    numbers = np.array([zlib.crc32(pair.target.encode()) for pair in plan.modules], np.uint32)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(plan.seed)))(numbers)
    data = np.asarray(jax.random.key_data(keys))
    by_target = {pair.target: row for pair, row in zip(plan.modules, data, strict=True)}

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        rows = stack.filled([by_target[pair.target] for pair in stack.pairs])
        return dataclasses.replace(evidence, key=jax.random.wrap_key_data(jnp.asarray(np.stack(rows))))

    return add


def _collect_selection(plan: Plan) -> AddEvidence:
    """Read from the pair's structure which source rows and columns each target module consists of."""
    structure, target = plan.pair.structure[0], plan.pair.target
    assert structure is not None  # checked when the alignment was planned

    def stacked(stack: ModuleStack, rows: list[np.ndarray | None]) -> jax.Array:
        found = [row for row in rows if row is not None]
        assert len(found) == len(stack.pairs)  # all are in layers that have a counterpart
        return jnp.asarray(np.stack(stack.filled(found)).astype(np.int32))

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        modules = [target.modules[pair.target] for pair in stack.pairs]
        outputs = stacked(stack, [structure.outputs(module.layer, module.role) for module in modules])
        inputs = stacked(stack, [structure.inputs(module.layer, module.role) for module in modules])
        return dataclasses.replace(evidence, selection=Selection(outputs, inputs))

    return add


def _collect_channels(plan: Plan) -> AddEvidence:
    """Read the scales of rows and columns; modules whose source has another name get ones."""
    scales = plan.pair.channels or ChannelScales({}, {})

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        named = [(pair.target if pair.source == pair.target else "", plan.shapes(pair)[1]) for pair in stack.pairs]
        rows, columns = zip(*stack.filled([scales.of(*one) for one in named]), strict=True)
        return dataclasses.replace(
            evidence, channels=ChannelPair(*(jnp.asarray(np.stack(side)) for side in (rows, columns)))
        )

    return add


PROVIDERS: dict[EvidenceKind, Provider] = {
    EvidenceKind.SINGULAR_VECTORS: Provider(
        collect_singular_vectors, cost=singular_vectors_cost, cache_key=lambda plan: plan.single_vectors
    ),
    EvidenceKind.SHARED_VOCABULARY: Provider(_collect_vocabulary, reads_tokenizers=True),
    EvidenceKind.ACTIVATIONS: Provider(
        collect_activations, reads_tokenizers=True, cost=activations_cost, cache_key=activations_key
    ),
    EvidenceKind.SELECTION: Provider(_collect_selection),
    EvidenceKind.CHANNEL_SCALES: Provider(_collect_channels),
    EvidenceKind.RANDOM_KEY: Provider(
        _collect_keys,
        check=lambda plan: check_seed(plan.seed),  # JAX would truncate a larger one to its lower 32 bits
        cache_key=lambda plan: plan.seed,
    ),
}
