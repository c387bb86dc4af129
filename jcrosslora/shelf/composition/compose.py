"""Put adapters of one base together, from files or from a folder that holds a composition."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jax.typing import DTypeLike

from jcrosslora.adapter import Adapter, load_adapter, split_fused
from jcrosslora.adapter.ignored import restrict
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import Params, fast_dtype, load_params, settings_of
from jcrosslora.decoder.adapters import RUN
from jcrosslora.errors import AdapterError
from jcrosslora.shelf.composition.composed import Composed
from jcrosslora.shelf.composition.composition import Composition
from jcrosslora.shelf.composition.registry import find_composition
from jcrosslora.shelf.composition.saving import read_composition, with_read_arrays
from jcrosslora.shelf.composition.updates import stack_for

_WHY = "adapters are composed in the linear modules alone"


def compose(
    base: BaseModel | str | Path,
    adapters: Sequence[Adapter | str | Path],
    how: str | Composition = "mixture",
    *,
    seed: int = 0,
    dtype: DTypeLike | None = None,
    params: Params | None = None,
    tokenizer: Tokenizer | None = None,
) -> Composed:
    """Put several adapters of one base together, to run them at once.

        both = jcl.compose("models/gemma-3-270m", ["adapters/json", "adapters/poems"], how="select")
        both.generate(["Lights off, please.", "A poem on rain:"], weights=[[1, 0], [0, 1]])

    Args:
        base: the model, opened, or what `open_base` opens; it needs a tokenizer.
        adapters: at least one of this base, loaded, or what `load_adapter` loads.
        how: "select", "mixture", "fusion", "gated", "router", "stack", or the controls "uniform" and "random-gate"; or
            one of these objects with settings of its own, such as `Router(rank=4)` of `jcrosslora.shelf.composition`.
        seed: of what a composition draws before it is trained.
        dtype: of the base's weights, float32 or bfloat16; None takes the faster one on this machine.
        params: the weights, if they are loaded already; then `dtype` is not used.
        tokenizer: of the base, if it is loaded already.

    Raises:
        UsageError: an unknown composition.
        AdapterError: there is no adapter, or one belongs to another base, updates experts, is active only after certain
            tokens (aLoRA), or has nothing in a linear module.
        CheckpointError: the base or its tokenizer cannot be read.
    """
    how = find_composition(how)
    base = base if isinstance(base, BaseModel) else open_base(base)
    own = tuple(_adapter(one, base) for one in adapters)
    if not own:
        msg = f"no adapters to compose: give at least one of {base.ref}"
        raise AdapterError(msg)
    how.check(own)
    updates = stack_for(how, own, base, seed)
    tokenizer = tokenizer or load_tokenizer(base)
    weights = load_params(base, dtype or fast_dtype()) if params is None else params
    return Composed(base, own, how, updates, settings_of(base), weights, tokenizer)


def load_composition(
    folder: str | Path,
    base: BaseModel | str | Path,
    *,
    dtype: DTypeLike | None = None,
    params: Params | None = None,
    tokenizer: Tokenizer | None = None,
) -> Composed:
    """Read a composition that `Composed.save` wrote.

    Args:
        folder: of the composition.
        base: the model that it was made for, opened, or what `open_base` opens.
        dtype: see `compose`.
        params: see `compose`.
        tokenizer: see `compose`.

    Raises:
        AdapterError: not such a folder, damaged, or of another base.
        CheckpointError: the base or its tokenizer cannot be read.
    """
    base = base if isinstance(base, BaseModel) else open_base(base)
    how, adapters, arrays = read_composition(Path(folder), base)
    found = compose(base, adapters, how, dtype=dtype, params=params, tokenizer=tokenizer)
    return dataclasses.replace(found, updates=with_read_arrays(found.updates, base, arrays, str(folder)))


def _adapter(given: Adapter | str | Path, base: BaseModel) -> Adapter:
    adapter = given if isinstance(given, Adapter) else load_adapter(given, base)
    if not adapter.modules and not adapter.experts:
        msg = f"{adapter.info.name}: has no update of a linear module of {base.ref}: leave it out"
        raise AdapterError(msg)
    return split_fused(restrict(adapter, RUN, _WHY), base.fused)
