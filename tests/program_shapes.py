"""Every compiled program of a move, with the shapes of a tiny base for arguments: nothing is computed or compiled."""

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_bases import llama_config, llama_tensors, random_adapter

import jcrosslora as jcl
from jcrosslora import Evidence, EvidenceKind
from jcrosslora.adapter import truncation
from jcrosslora.checkpoint import weight_stacks
from jcrosslora.decoder import (
    Model,
    Sampling,
    load_model,
    loading,
    prompt_queue,
    sampling,
    stack_adapter,
)
from jcrosslora.decoder.layout import Layout
from jcrosslora.distill import DistillSettings, fit, judge, output_columns, teacher
from jcrosslora.distill.sources import decoder as decoder_source
from jcrosslora.distill.sources import predictions
from jcrosslora.distill.sources.decoder import RestrictedModel
from jcrosslora.evaluate import effect, engine_check, log_probs
from jcrosslora.linalg import svd as choose
from jcrosslora.linalg import svd_float64 as refine
from jcrosslora.linalg.svd import AXIS
from jcrosslora.maps import activations, align
from jcrosslora.maps.evidence import Activations, ChannelPair, Selection, Side, Vocabulary
from jcrosslora.methods import METHODS, MapMethod
from jcrosslora.session import timing
from jcrosslora.training import Batch, TrainingSettings
from jcrosslora.training import batches as training_batches
from jcrosslora.training import run as training_run
from jcrosslora.training.checkpoints import Optimizer

# Sizes that no other test has: JAX remembers what it traced, and these are traced as on an accelerator.
DIMS = {"hidden": 22, "heads": 2, "kv_heads": 1, "head_dim": 10, "intermediate": 26, "layers": 2, "vocab": 37}
LAYERS, BATCH, LENGTH, PLACES, RANK = 2, 3, 7, 5, 4
# Programs of a shelf and of several adapters at once are no part of a move.
ELSEWHERE = ("jcrosslora.shelf",)
JITTED = type(jax.jit(lambda x: x))


class Program(NamedTuple):
    """A compiled function and what it is called with; in float64 only where that is said."""

    function: Any
    given: tuple[Any, ...]
    named: dict[str, Any] = {}  # noqa: RUF012
    label: str = ""
    float64: bool = False


def name_of(function: Any) -> str:
    return f"{function.__module__}.{function.__name__}"


def compiled_functions() -> set[str]:
    """The names of all functions of the package that are compiled where they are defined."""
    for module in pkgutil.walk_packages(jcl.__path__, "jcrosslora."):
        # The command line runs when it is imported; lm_eval's model needs a package that may be missing.
        needs_more = module.name == "jcrosslora.evaluate.harness"
        if not module.name.endswith("__main__") and not module.name.startswith(ELSEWHERE) and not needs_more:
            importlib.import_module(module.name)
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "jcrosslora"]
    found = {name_of(value) for module in modules for value in vars(module).values() if isinstance(value, JITTED)}
    return {name for name in found if not name.startswith(ELSEWHERE)}


def of(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def whole(*shape: int) -> jax.ShapeDtypeStruct:
    return of(*shape, dtype=jnp.int32)


def told(*shape: int) -> jax.ShapeDtypeStruct:
    return of(*shape, dtype=jnp.bool_)


def a_key(*shape: int) -> jax.ShapeDtypeStruct:
    return of(*shape, dtype=jax.random.key(0).dtype)


DRAWN = Sampling(of(), a_key(), whole())


def two_devices() -> Mesh:
    return Mesh(np.array(jax.local_devices()[:2]), (AXIS,))


def divided(tree: Any, mesh: Mesh, axis: str | None = AXIS) -> Any:
    """The same shapes, each first axis divided over the devices of a mesh, or with None the whole on each of them."""
    sharding = NamedSharding(mesh, PartitionSpec(axis))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


class Shapes:
    """The shapes of a base, of an adapter of it and of a batch of texts."""

    def __init__(self, base: jcl.BaseModel) -> None:
        self.base: Model = jax.eval_shape(partial(load_model, base, jnp.bfloat16))
        self.adapter = jax.eval_shape(lambda: stack_adapter(random_adapter(base, rank=2), base))
        self.model = self.base.with_adapter(self.adapter)
        self.tokens, self.mask, self.at = whole(BATCH, LENGTH), told(BATCH, LENGTH), whole(PLACES)
        self.vocab, self.hidden = base.dims.vocab, base.dims.hidden
        self.read = self.tokens, self.mask, self.at

    def passes(self) -> Iterator[Program]:
        """What differs by family: writing, which runs whole prompts and single tokens, and the gradient of a fit."""
        yield Program(sampling.extend, (self.model, self.begun(), DRAWN), {"count": 4, "stop_tokens": (1,)})
        yield self.step(remat=True)

    def streamed(self, base: jcl.BaseModel) -> Iterator[Program]:
        """What a source does whose layers stay in the host's memory: it reads and writes."""
        model = load_model(base, jnp.bfloat16, streamed=True)
        model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model)
        model = model.with_adapter(self.adapter)
        yield Program(sampling.prefill, (model, *self.read[:2]), {"room": 4}, "streamed")
        given = {"count": 4, "stop_tokens": (1,)}
        yield Program(sampling.extend, (model, self.begun(), DRAWN), given, "streamed")

    def begun(self) -> Any:
        return jax.eval_shape(partial(sampling.prefill, room=4), self.model, *self.read[:2])

    def step(self, *, remat: bool) -> Program:
        taught = teacher.TaughtBatch(*self.read, of(PLACES), of(PLACES, self.vocab))
        state = jax.eval_shape(partial(fit.first_state, settings=DistillSettings()), self.base)
        given = RestrictedModel(self.base), state, taught, of()
        return Program(fit.gradient_step, given, {"remat": remat})

    def batch(self) -> Batch:
        return Batch(self.tokens, self.mask, whole(PLACES), whole(PLACES), of(PLACES), whole(BATCH))


def tiny() -> jcl.BaseModel:
    return jcl.open_base(llama_tensors(**DIMS), config=llama_config(**DIMS), name="tiny")


def programs() -> Iterator[Program]:
    shapes = Shapes(tiny())
    yield from shapes.passes()
    yield from shapes.streamed(tiny())
    yield from decoder_programs(shapes)
    yield from svd_programs()
    yield from alignment_programs()
    yield from evidence_programs(shapes)
    yield from fit_programs(shapes)
    yield from training_programs(shapes)
    yield from evaluation_programs(shapes)


def decoder_programs(shapes: Shapes) -> Iterator[Program]:
    texts = shapes.read[:2]
    yield Program(sampling.prefill, (shapes.model, *texts), {"room": 4})
    behind = sampling.Behind(whole(2, 6), told(2, 6), whole(BATCH))
    yield Program(sampling.prefill, (shapes.model, *texts, behind), {"room": 4})
    yield Program(loading._write, (of(3, 22), of(1, 22), whole()))
    begun = shapes.begun()
    both = begun.replace(cache=(begun.cache, begun.cache))
    given = shapes.model, both, (of(), of()), DRAWN
    yield Program(sampling.extend_amplified, given, {"count": 4, "stop_tokens": ()})
    sizes = {"rows": 4, "slots": 16}
    yield Program(prompt_queue.blank, (begun,), sizes)
    state = jax.eval_shape(partial(prompt_queue.blank, **sizes), begun)
    yield Program(prompt_queue.enter, (state, begun, whole(BATCH), whole(), whole()))
    yield Program(timing._pass, (shapes.base, shapes.tokens))
    yield Program(timing._gradient, (shapes.base, shapes.adapter, shapes.tokens))


def svd_programs() -> Iterator[Program]:
    """With every kernel, both orientations, and the two ways of refining."""
    # `krylov` needs a subspace that is narrower than the matrix.
    for kernel, shape in [(name, (190, 230) if "krylov" in name else (25, 19)) for name in choose.KERNELS]:
        for rows, columns in (shape, shape[::-1]):
            one = {"kernel": kernel, "rank": 3, "vectors": True}
            yield Program(choose._run_stack, (of(LAYERS, rows, columns),), {**one, "mesh": None}, kernel)
        yield Program(choose._run_one, (of(*shape),), one, kernel)
    given = {"kernel": "gram", "rank": 3, "vectors": True}
    mesh = two_devices()
    yield Program(choose._run_stack, (divided(of(LAYERS, 25, 19), mesh),), {**given, "mesh": mesh}, "on two devices")
    found = jax.eval_shape(partial(choose._run_stack, **given, mesh=None), of(LAYERS, 190, 230))
    better = jax.tree.map(lambda leaf: of(1, *leaf.shape[1:], dtype=leaf.dtype), found)
    yield Program(choose._replace_rows, (found, whole(1), better))
    for width in (35, 150):
        yield Program(refine._refine, (of(230, 190), of(190, width), 3, True), label=str(width), float64=True)
    yield Program(truncation._by_singular_values, (of(25, 4), of(4, 19)))


def alignment_programs() -> Iterator[Program]:
    """The maps of every method that has some."""
    # Other tests of this process may have registered methods.
    shipped = [kind for kind in METHODS.values() if kind.__module__.startswith("jcrosslora.")]
    for name, method in ((kind.name, kind()) for kind in shipped if issubclass(kind, MapMethod)):
        sizes = (25, 19), (25, 19) if method.equal_shapes else (17, 23)
        evidence = evidence_of(method, *sizes)
        yield Program(align._map_stack, (evidence, method, None), label=name)
    mesh, method = two_devices(), METHODS["cross-lora"]()
    evidence = evidence_of(method, (25, 19), (17, 23))
    words = divided(evidence.vocabulary, mesh, None)
    evidence = dataclasses.replace(divided(evidence, mesh), vocabulary=words)
    yield Program(align._map_stack, (evidence, method, mesh), label="on two devices")


def evidence_of(method: Any, src: tuple[int, int], tgt: tuple[int, int]) -> Evidence:
    """All evidence that a method asks for, of two modules that read the stream."""
    wanted, rank = method.requires, 3

    def side(rows: int, columns: int) -> Side:
        svd = None
        if EvidenceKind.SINGULAR_VECTORS in wanted:
            run = partial(choose._run_stack, kernel="gram", rank=rank, vectors=True, mesh=None)
            svd = jax.eval_shape(lambda stack: choose._cut(run(stack), rank), of(LAYERS, rows, columns))
        return Side(of(LAYERS, rows, columns), of(LAYERS, columns), svd)

    (rows_src, src_in), (rows_tgt, tgt_in) = src, tgt
    two = [of(LAYERS, n) for n in (src_in, tgt_in, rows_src, rows_tgt)]
    grams = [of(LAYERS, n, n) for n in (src_in, tgt_in, rows_src, rows_tgt)]
    moments = Activations(
        of(LAYERS, src_in, tgt_in),
        of(LAYERS, rows_src, rows_tgt),
        *((two[i], two[i + 1]) for i in (0, 2)),
        *((grams[i], grams[i + 1]) for i in (0, 2)),
    )
    cross = of(src_in, tgt_in)
    words = Vocabulary(cross, of(src_in, src_in), of(tgt_in, tgt_in), 9)
    seen = EvidenceKind.ACTIVATIONS in wanted or EvidenceKind.ACTIVATION_GRAMS in wanted
    return Evidence(
        side(*src),
        side(*tgt),
        words,
        moments if seen else None,
        a_key(LAYERS) if EvidenceKind.RANDOM_KEY in wanted else None,
        reads=True,
        rank=rank,
        selection=Selection(whole(LAYERS, rows_tgt), whole(LAYERS, tgt_in))
        if EvidenceKind.SELECTION in wanted
        else None,
        channels=ChannelPair(of(LAYERS, rows_tgt), of(LAYERS, tgt_in))
        if EvidenceKind.CHANNEL_SCALES in wanted
        else None,
        method=method.name,
    )


def evidence_programs(shapes: Shapes) -> Iterator[Program]:
    yield Program(weight_stacks._widen, (of(LAYERS, 21, 23, dtype=jnp.bfloat16),))
    roles, given = tuple(shapes.base.params.weights), ((shapes.tokens, shapes.mask), (shapes.at, told(PLACES)))
    yield Program(activations._rows, (shapes.base, roles, *given))
    rows = jax.eval_shape(lambda model, *given: activations._rows(model, roles, *given), shapes.base, *given)
    totals = jax.eval_shape(partial(activations.zero_moments, grams=True), rows, rows)
    yield Program(activations.add_rows, (totals, rows, rows, whole(LAYERS)))


def fit_programs(shapes: Shapes) -> Iterator[Program]:
    restricted = RestrictedModel(shapes.model, 2)
    yield Program(decoder_source.shared_log_probs, (restricted, *shapes.read))
    said = of(PLACES, shapes.vocab)
    yield Program(teacher.mix_teacher, (said, said, said, of(), of(), of()))
    yield Program(teacher.weighted_kl, (said, said, of(PLACES)))
    splits = output_columns.TokenSplits(whole(BATCH), whole(BATCH), of(BATCH))
    transfer = output_columns.MassTransfer(splits, whole(PLACES), whole(PLACES), whole(PLACES))
    yield Program(output_columns.in_target_columns, (said, transfer, (shapes.vocab - 2, 1, True)))
    taught = teacher.TaughtBatch(*shapes.read, of(PLACES), said)
    yield Program(judge._kl_and_hits, (RestrictedModel(shapes.model), taught, whole(PLACES)))
    yield Program(judge._likeliest, (restricted, judge.AnswerBatch(*shapes.read, whole(PLACES))))
    one = of(PLACES)
    yield Program(teacher.mix_in_text, (taught, whole(PLACES), one, one))
    yield Program(predictions.spread, (said, one, one, said))
    yield Program(decoder_source._hidden, (shapes.model, *shapes.read[:2]))
    states = of(PLACES, shapes.hidden)
    yield Program(decoder_source._divergence, (shapes.base, states, states, whole(PLACES)))


def training_programs(shapes: Shapes) -> Iterator[Program]:
    adapter = shapes.adapter
    yield Program(training_batches.loss_and_gradient, (shapes.base, adapter, shapes.batch(), of(), True))
    for optimizer in get_args(Optimizer):
        chosen = TrainingSettings(optimizer=optimizer)
        state = jax.eval_shape(partial(training_batches.first_state, settings=chosen), adapter)
        yield Program(training_batches.update, (chosen, state, adapter), label=optimizer)
    own = {role: of(LAYERS) for role in adapter.roles}
    given = shapes.base, adapter, own, shapes.batch(), False
    yield Program(training_run.loss_and_magnitude_gradient, given)


def evaluation_programs(shapes: Shapes) -> Iterator[Program]:
    states, wanted = of(PLACES, shapes.hidden), whole(PLACES)
    yield Program(effect._states, (shapes.model, *shapes.read[:2]))
    yield Program(engine_check._predict, (shapes.model, *shapes.read[:2]))
    yield Program(effect._compare, (shapes.base, states, states, wanted))
    two = jax.tree.map(lambda leaf: of(2, *leaf.shape, dtype=leaf.dtype), shapes.adapter)
    given = shapes.base.with_adapter(two), 2, whole(4, 5), Layout(*[whole(4, 5)] * 3)
    yield Program(log_probs._row_states, (*given, (whole(2, 6), told(2, 6)), whole(4)), label="behind beginnings")
    yield Program(log_probs._row_states, (*given, None, whole(4)))
    yield Program(log_probs._predictions, (shapes.base, of(2, PLACES, shapes.hidden), wanted))
