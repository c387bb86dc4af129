"""Put adapters of one base together: at once, one after the other, or from a folder that holds a composition."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jcrosslora.adapter import Adapter, load_adapter, split_fused
from jcrosslora.adapter.records import restrict
from jcrosslora.checkpoint import BaseModel, SafetensorsFile, Tokenizer, load_tokenizer, open_base
from jcrosslora.checkpoint.base import base_digest
from jcrosslora.checkpoint.store import read_json_object
from jcrosslora.decoder import Model, fast_dtype, load_model
from jcrosslora.decoder.model import RUN
from jcrosslora.errors import AdapterError, CheckpointError, UsageError
from jcrosslora.evaluate import Example, read_examples
from jcrosslora.shelf.composition.composed import ADAPTERS, ARRAYS, FACTS, FORM, Composed, digests_of
from jcrosslora.shelf.composition.composition import Arrays, ComposedAdapter, Composition, module_names, stack_for
from jcrosslora.shelf.composition.fit import mean_divergence
from jcrosslora.shelf.composition.ways import COMPOSITIONS, SHARE, Stack, find_composition
from jcrosslora.training import TrainingSettings

_WHY = "adapters are composed in the linear modules alone"


def compose(
    base: BaseModel | str | Path | Any,
    adapters: Sequence[Adapter | str | Path | Any],
    how: str | Composition = "mixture",
    *,
    seed: int = 0,
    dtype: DTypeLike | None = None,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> Composed:
    """Put several adapters of one base together, to run them at once.

        both = jcl.compose("models/gemma-3-270m", ["adapters/json", "adapters/poems"], how="select")
        both.generate(["Lights off, please.", "A poem on rain:"], weights=[[1, 0], [0, 1]])

    Args:
        base: the model, opened, or what `open_base` opens; it needs a tokenizer.
        adapters: at least one of this base, loaded, or what `load_adapter` loads.
        how: "select", "mixture", "gated", "router", "stack", or the control "uniform"; or one of these
            objects with other settings, for example `Router(rank=4)` of `jcrosslora.shelf.composition`.
        seed: of the arrays that a composition draws before it is trained.
        dtype: of the base's weights, float32 or bfloat16; None takes the faster one on this machine.
        model: the base, if it is loaded already (`jcrosslora.decoder.load_model`); then `dtype` is not used.
        tokenizer: of the base, if it is loaded already.

    Raises:
        UsageError: an unknown composition.
        AdapterError: there is no adapter, or one belongs to another base, updates experts, is active only after certain
            tokens (aLoRA), or has nothing in a linear module.
        CheckpointError: the base or its tokenizer cannot be read.
    """
    how = find_composition(how)
    base = open_base(base)
    opened = tuple(_open_adapter(one, base) for one in adapters)
    if not opened:
        raise AdapterError(f"no adapters to compose: give at least one of {base.ref}")
    updates = stack_for(how, opened, base, seed)
    tokenizer = tokenizer or load_tokenizer(base)
    return Composed(base, opened, how, updates, model or load_model(base, dtype or fast_dtype()), tokenizer)


def load_composition(
    folder: str | Path,
    base: BaseModel | str | Path | Any,
    *,
    dtype: DTypeLike | None = None,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> Composed:
    """Read a composition that `Composed.save` wrote, for the base that it was made for; see `compose`.

    Raises:
        AdapterError: no composition, a damaged one, or one of another base.
        CheckpointError: the base or its tokenizer cannot be read.
    """
    base = open_base(base)
    place = Path(folder).expanduser()
    try:
        how, names, arrays = _read_composition(place, base)
    except CheckpointError as error:
        raise AdapterError(f"{place}: holds no composition that can be read ({error})") from error
    adapters = []
    for number, name in enumerate(names):
        adapter = load_adapter(place / ADAPTERS / str(number), base)
        adapters.append(dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, name=name)))
    found = compose(base, adapters, how, dtype=dtype, model=model, tokenizer=tokenizer)
    return dataclasses.replace(found, updates=_with_arrays(found.updates, base, arrays, folder))


def _read_composition(folder: Path, base: BaseModel) -> tuple[Composition, list[str], dict[str, np.ndarray]]:
    """Read the composition, the names of its adapters, and its arrays by their names in the file."""
    facts = read_json_object(folder / FACTS)
    how, names = _stated(folder, facts), facts["adapters"]
    stated = facts.get("base_digest")
    if isinstance(stated, str) and stated != base_digest(base):
        msg = f"{folder}: was made for another base, {facts.get('base')} ({stated[:19]}...), than {base.ref} "
        raise AdapterError(msg + f"({base_digest(base)[:19]}...): give that one, or compose the adapters again")
    digests, stated = digests_of(folder), facts.get("digests")  # an earlier version wrote none
    for name, digest in stated.items() if isinstance(stated, dict) else ():
        if digests.get(name) != digest:
            raise AdapterError(f"{folder}: {name} is missing or was changed after writing: compose the adapters again")
    arrays = {}
    if (folder / ARRAYS).exists():
        opened = SafetensorsFile(folder / ARRAYS)
        arrays = {name: np.array(opened.array(name)) for name in opened.entries}
    sizes = {size for array in arrays.values() for size in array.shape}
    for name, value in dataclasses.asdict(how).items():
        if value not in sizes:  # before arrays of that size are made
            msg = f"{folder}: {FACTS} states {name} {value}, and no array in {ARRAYS} has this size: save the "
            raise AdapterError(msg + "composition again")
    return how, names, arrays


def _stated(folder: Path, facts: Mapping[str, Any]) -> Composition:
    form, name, settings, names = map(facts.get, ("form", "composition", "settings", "adapters"))
    kind = COMPOSITIONS.get(name) if form == FORM and isinstance(name, str) else None
    listed = isinstance(names, list) and names and all(isinstance(one, str) for one in names)
    if kind is not None and listed and isinstance(settings, dict):
        numbers = {field: value for field, value in settings.items() if isinstance(value, int)}
        if numbers.keys() == settings.keys() == {field.name for field in dataclasses.fields(kind)}:
            return kind(**numbers)
    msg = f"{folder}: {FACTS} is of form {form!r} and composition {name!r}, which this version does not read: save the "
    raise AdapterError(msg + "composition again, or update jcrosslora")


def _with_arrays(
    updates: ComposedAdapter, base: BaseModel, arrays: Mapping[str, np.ndarray], folder: str | Path
) -> ComposedAdapter:
    """Replace the composition's arrays by those of a file.

    Raises AdapterError if one is missing, has another shape or dtype, or belongs to no module that an adapter updates.
    """
    wanted = updates.by_module(base)
    if wrong := sorted(wanted.keys() ^ arrays.keys()):
        what = "lacks" if wrong[0] in wanted else "holds"
        msg = f"{folder}: {ARRAYS} {what} {wrong[0]}, and an array of each module that an adapter updates is needed: "
        raise AdapterError(msg + "save the composition again")
    for name, array in arrays.items():
        if array.shape != wanted[name].shape or array.dtype != np.float32:
            came = f"{name} of shape {list(array.shape)} and {array.dtype}"
            msg = f"{folder}: {came}, expected float32 {list(wanted[name].shape)}: it belongs to another base"
            raise AdapterError(msg)
    found: dict[str, Arrays] = {}
    for role, one in updates.roles.items():
        modules = module_names(base, role)
        found[role] = {name: jnp.stack([arrays[f"{module}.{name}"] for module in modules]) for name in one.arrays}
    return updates.with_arrays(found)


def _open_adapter(given: Adapter | str | Path, base: BaseModel) -> Adapter:
    adapter = load_adapter(given, base)
    if not adapter.modules and not adapter.experts:
        raise AdapterError(f"{adapter.info.name}: has no update of a linear module of {base.ref}: leave it out")
    return split_fused(restrict(adapter, RUN, _WHY), base.fused)


@dataclass(frozen=True, eq=False)
class Additions:
    """N adapters that were added one by one.

    Attributes:
        composed: all of them, as the composition `stack`.
        kl: float64 (N, N), row i after adapter i was added: how far the sum is from each adapter alone, the mean
            KL(adapter alone || sum) over the tokens of the answers in its texts, nats; NaN for later adapters.
    """

    composed: Composed
    kl: np.ndarray

    def __str__(self) -> str:
        """A table: a row for each addition, a column for the texts of each adapter."""
        names = [Path(name).name for name in self.composed.names]
        cells = [["" if np.isnan(value) else f"{value:.4f}" for value in row] for row in self.kl]
        rows = [["KL on texts of", *names], *([f"+ {name}", *row] for name, row in zip(names, cells, strict=True))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def add_in_turn(
    base: BaseModel,
    adapters: Sequence[Adapter | str | Path | Any],
    examples: Sequence[Sequence[Example] | str | Path],
    settings: TrainingSettings = TrainingSettings(rate=0.05),  # noqa: B008
    *,
    rehearse: bool = True,
) -> Additions:
    """Add adapters to a sum one after the other, after SD-LoRA: directions stay, all magnitudes are trained each time.

    After each addition the sum is trained to predict, on the texts of an adapter, what this adapter predicts alone.

    Args:
        adapters: at least one of the base, in the order in which they are added.
        examples: for each adapter at least one, or the JSONL file of them.
        settings: of the training after each addition; the rate is a share of an update's magnitude.
        rehearse: whether the texts of earlier adapters are used again; False uses only those of the new one, as SD-LoRA
            does.

    Raises:
        UsageError: another number of entries than of adapters, an empty one, or as `Composed.fit`.
        AdapterError, CheckpointError: see `compose`.
    """
    texts = [read_examples(each) if isinstance(each, str | Path) else list(each) for each in examples]
    if len(texts) != len(adapters) or not all(texts):
        msg = f"texts of {sum(map(bool, texts))} adapters for {len(adapters)}: give at least one of each, in order"
        raise UsageError(msg)
    composed = compose(base, adapters, Stack())
    loaded, opened, kl = {"model": composed.model, "tokenizer": composed.tokenizer}, composed.adapters, []
    for count in range(1, len(texts) + 1):
        grown = compose(base, opened[:count], Stack(), **loaded)
        if count > 1:  # the first is the sum already, and Adam would make steps of its gradient's rounding errors
            used = [each if rehearse or number == count - 1 else [] for number, each in enumerate(texts[:count])]
            grown = _continued(grown, composed).fit(used, settings)
        composed, given = grown, (grown.model, grown.tokenizer, grown.updates)
        kl.append([mean_divergence(*given, each, number) for number, each in enumerate(texts[:count])])
    rows = [[*row, *[np.nan] * (len(texts) - len(row))] for row in kl]
    return Additions(composed, np.array(rows))


def _continued(grown: Composed, before: Composed) -> Composed:
    """Start from the magnitudes that earlier adapters have by now."""
    shares = {role: one.arrays[SHARE] for role, one in grown.updates.roles.items()}
    for role, one in before.updates.roles.items():
        old = one.arrays[SHARE]
        shares[role] = shares[role].at[:, : old.shape[1]].set(old)
    arrays = {role: {SHARE: array} for role, array in shares.items()}
    return dataclasses.replace(grown, updates=grown.updates.with_arrays(arrays))
