"""Extract a LoRA from a full fine-tune and its base: the truncated SVD of W_finetune - W_base, module by module.

By Eckart and Young (1936) it is the nearest update of its rank in the Frobenius norm. The ranks are set by one rank for
all modules, by a share of each module's energy, or by a total number of bytes.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jcrosslora.adapter import changes
from jcrosslora.adapter.combining import split_fused
from jcrosslora.adapter.contents import FileDtype
from jcrosslora.adapter.difference import Leading, Rest, check_alike, module_differences, rest_of
from jcrosslora.adapter.names import ending
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.adapter.save import save_adapter
from jcrosslora.checkpoint import BaseModel, describe_base, load_tokenizer, open_base
from jcrosslora.checkpoint.base import base_digest
from jcrosslora.checkpoint.hub import local_names, public_name, publish
from jcrosslora.errors import AdapterError, CheckpointError, UsageError
from jcrosslora.utils import version
from jcrosslora.utils.files import parse_size
from jcrosslora.utils.progress import track
from jcrosslora.utils.settings import Settings

Kept = Literal["norms", "biases", "embeddings"]
_RANK = 16


@dataclass(frozen=True)
class ExtractSettings(Settings):
    """The settings of an extraction; one of rank, energy and budget decides the ranks."""

    rank: int | None = None
    """Rank of every module; 16 if neither an energy nor a budget is given."""
    energy: float | None = None
    """For each module the lowest rank that holds this share of its difference's squared Frobenius norm, such as 0.9."""
    budget: str | None = None
    """Bytes of all factors together, such as 20MB: what holds most for its bytes is kept, whatever module it is in."""
    max_rank: int | None = None
    """The highest rank of a module, for an energy or a budget; it saves time."""
    keep: tuple[Kept, ...] = ()
    """What else of the difference is kept, whole: norms, biases, embeddings (with the output head)."""
    dtype: FileDtype = "float32"
    """Number format of the file, in which the budget counts."""

    def __post_init__(self) -> None:
        """Raise UsageError for values out of range, and for more than one of rank, energy and budget."""
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            msg = (
                f"{' and '.join(given)} were given, expected one of them, which decides the ranks: leave out the others"
            )
            raise UsageError(msg)
        rules = {
            "rank": (self.rank is None or self.rank >= 1, "1 or more"),
            "energy": (self.energy is None or 0 < self.energy <= 1, "a share above 0, up to 1"),
            "budget": (self.budget is None or self._bytes > 0, "a number of bytes such as 20MB"),
            "max_rank": (self.max_rank is None or (self.max_rank >= 1 and self.mixed), "1 or more, not with rank"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise UsageError(f"extraction with {name} {getattr(self, name)!r}: expected {wanted}")

    @property
    def mixed(self) -> bool:
        """Whether each module gets its own rank."""
        return self.energy is not None or self.budget is not None

    @property
    def rule(self) -> str:
        """What decides the ranks, in words."""
        if self.energy is not None:
            return f"{self.energy:.4g} of each module's energy"
        return f"rank {self.rank or _RANK}" if self.budget is None else f"{self.budget} of factors"

    def limit(self, shape: tuple[int, ...]) -> int:
        """Return the highest rank that a module (O, I) can get."""
        most = (self.max_rank or min(shape)) if self.mixed else self.rank or _RANK
        return most if self.budget is None else min(most, self._bytes // self._cost(shape))

    def choose(self, found: Mapping[str, Leading], name: str, new: Leading) -> dict[str, Leading]:
        """Add a module's difference to the others, and truncate all to their ranks.

        A budget keeps the triplets with the most energy per byte. A triplet that does not fit now will not fit with
        more modules either, so it is dropped at once, and memory stays within the budget.
        """
        if self.budget is None:
            return {**found, name: new if self.energy is None else new.cut(new.lowest_rank(self.energy))}
        found = {**found, name: new}
        sizes = [len(one.s) for one in found.values()]
        owners = np.repeat(np.arange(len(found)), sizes)
        cost = np.repeat([self._cost(one.factors.shape) for one in found.values()], sizes)
        worth = np.square(np.concatenate([one.s for one in found.values()]), dtype=np.float64) / cost
        order = np.argsort(-worth, kind="stable")
        taken = order[np.cumsum(cost[order]) <= self._bytes]
        ranks = np.bincount(owners[taken], minlength=len(found))
        return {name: one.cut(int(rank)) for (name, one), rank in zip(found.items(), ranks, strict=True)}

    @property
    def _bytes(self) -> int:
        return parse_size(str(self.budget or "")) or 0

    def _cost(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that each rank of a module (O, I) takes."""
        return sum(shape) * (4 if self.dtype == "float32" else 2)


def extract(finetune: Any, base: Any, settings: ExtractSettings = ExtractSettings()) -> Adapter:
    """Extract a LoRA of `base` from a model that was trained from it, by the truncated SVD of each weight's difference.

    Args:
        finetune: the trained model, like `base` a `BaseModel` or what `open_base` takes.

    Returns:
        The adapter, in float32; `info.read_as` and `info.ignored` say which part of the difference it lacks.

    Raises:
        CheckpointError: a model cannot be read, or the two differ in their tensors or shapes.
        AdapterError: the two have the same weights in all linear modules, or the budget is too small for one rank.
    """
    return extract_with_figures(open_base(finetune), open_base(base), settings).adapter


def extract_with_figures(finetune: BaseModel, base: BaseModel, settings: ExtractSettings) -> "Extracted":
    """Extract a LoRA as `extract` does, with the figures of each module."""
    notes = tuple(filter(None, (check_alike(finetune, base), _rounding(finetune, base))))
    # As the base stores them: fused ones whole.
    shapes = {one.tensor.removesuffix(".weight"): base.store.shape(one.tensor) for one in base.modules.values()}
    found: dict[str, Leading] = {}
    with track(len(shapes), "extract", "modules") as bar:
        for name, leading in module_differences(finetune, base, shapes, settings.limit):
            if leading.energy:
                found = settings.choose(found, name, leading)
            bar.update()
    if not any(len(one.s) for one in found.values()):
        why = f"not one rank fits {settings.rule}" if found else "they have the same weights in all linear modules"
        msg = f"there is no update to extract from {finetune.name} and {base.name}: {why}: give "
        raise AdapterError(msg + ("a larger budget" if found else "a fine-tune and the base that it was trained from"))
    modules = {name: found[name] for name in shapes if name in found}
    return Extracted(finetune, base, settings, modules, rest_of(finetune, base), notes)


@dataclass(frozen=True, eq=False)
class Extracted:
    """What was extracted, and how much of the difference of the two models it holds.

    Attributes:
        modules: what is kept of each linear module whose weights differ, as the base stores it.
        rest: ||dT||_F^2 of each tensor outside linear modules that differs, by kind and name.
        notes: further remarks, one sentence each.
    """

    finetune: BaseModel
    base: BaseModel
    settings: ExtractSettings
    modules: Mapping[str, Leading]
    rest: Mapping[Rest, Mapping[str, float]]
    notes: tuple[str, ...]

    @cached_property
    def shares(self) -> dict[str, float]:
        """The share of "modules" and of each kind of `rest` in the whole difference's squared Frobenius norm."""
        sizes = {"modules": math.fsum(one.energy for one in self.modules.values())}
        sizes |= {kind: math.fsum(tensors.values()) for kind, tensors in self.rest.items()}
        return {kind: size / math.fsum(sizes.values()) for kind, size in sizes.items()}

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The figures of each kind of module; the last row is for all modules.

        `share` is the kind's share of all modules' energy (the squared Frobenius norm of D); `kept` the share of its
        energy that the ranks hold; `error` is ||D - B A||_F / ||D||_F.
        """
        kinds: dict[str, list[Leading]] = defaultdict(list)
        for name, one in self.modules.items():
            kinds[ending(name)].append(one)
        rows, every = [], list(self.modules.values())
        for kind, items in {**kinds, "all": every}.items():
            energy, ranks = math.fsum(one.energy for one in items), [len(one.s) for one in items]
            lost = math.fsum(one.energy * (1 - one.kept) for one in items) / energy
            share = energy / math.fsum(one.energy for one in every)
            figures = {"share": share, "kept": 1 - lost, "error": math.sqrt(lost)}
            rows.append({"kind": kind, "modules": len(items), "ranks": [min(ranks), max(ranks)], **figures})
        return rows

    @property
    def left_out(self) -> tuple[str, ...]:
        """The kinds of the rest that are not kept."""
        return tuple(kind for kind in self.rest if kind not in self.settings.keep)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        modules = {name: {"rank": len(one.s), "kept": one.kept} for name, one in self.modules.items()}
        made = {"rule": self.settings.rule, "kinds": self.rows, "modules": modules, "shares": self.shares}
        return {**made, "left_out": list(self.left_out), "notes": list(self.notes)}

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter, with fused modules split."""
        stored = {name: one.factors for name, one in self.modules.items() if len(one.s)}
        parts = split_fused(Adapter(stored), self.base.fused).modules
        kept, name = self.rows[-1]["kept"], public_name(self.finetune.name) or self.finetune.name
        info = AdapterInfo(
            name=name,
            base_name=self.base.name,
            read_as=f"the difference of {name} from its base at {self.settings.rule}, which keeps {kept:.1%} of it",
            lost=1 - kept,
            ignored=tuple(f"{kind} of {name} ({self.shares[kind]:.1%} of its difference)." for kind in self.left_out),
            chat_template=_own_template(self.finetune, self.base),
        )
        modules = {name: parts[name] for name in self.base.modules if name in parts}
        return Adapter(modules, info, tuple(self._tokens()), tuple(self._replaced()))

    def _replaced(self) -> Iterator[changes.ReplacedTensors]:
        for kind, form in (("norms", "full"), ("biases", "bias")):
            if kind in self.settings.keep and kind in self.rest:
                tensors = {name: np.asarray(self.finetune.tensor(name)) for name in self.rest[kind]}
                yield changes.ReplacedTensors(form, tensors, self.shares[kind])

    def _tokens(self) -> Iterator[changes.TokenUpdate]:
        if "embeddings" not in self.settings.keep or "embeddings" not in self.rest:
            return
        tied = self.finetune.tied and self.base.tied
        ids = np.arange(min(self.finetune.dims.vocab, self.base.dims.vocab))
        found = [
            changes.changed_rows(table, "full", self.base, ids, self.finetune.rows(name, ids))
            for table in ((changes.TIED,) if tied else (changes.EMBEDDING, changes.HEAD))
            if (name := f"{changes.MODULES[table][0]}.weight") in self.rest["embeddings"]
        ]
        unit = self.shares["embeddings"] / math.fsum(self.rest["embeddings"].values())
        yield from (replace(one, share=unit * one.energy) for one in changes.complete_rows(found, self.base))

    def save(self, out: Path, overwrite: bool = False) -> Path:
        """Write the adapter as a PEFT folder, with its origin and figures as JSON in the header of the weights file.

        The profile is peft if each module gets its own rank or more than LoRA is kept, else portable. Raises
        OutputError if the folder exists already, or cannot be written.
        """
        models, paths = {"finetune": self.finetune, "base": self.base}, []
        made: dict[str, Any] = {"version": version(), **self.to_json()}
        for role, one in models.items():
            made[role] = {"name": one.name, "revision": one.revision, "digest": base_digest(one)}
            paths += [one.name, one.ref]
        return save_adapter(
            self.adapter,
            out,
            base=describe_base(self.base, digest=made["base"]["digest"]),
            profile="peft" if self.settings.mixed or self.settings.keep else "portable",
            dtype=self.settings.dtype,
            overwrite=overwrite,
            metadata={"jcrosslora.extract": json.dumps(publish(made, local_names(*paths)))},
        )


def _rounding(finetune: BaseModel, base: BaseModel) -> str | None:
    """Return a remark if the two are stored in different number formats: their rounding is part of the difference."""
    formats = [", ".join(sorted({module.dtype for module in one.modules.values()})) for one in (finetune, base)]
    if formats[0] == formats[1]:
        return None
    return f"the fine-tune is stored as {formats[0]}, the base as {formats[1]}: the difference holds their rounding"


def _own_template(finetune: BaseModel, base: BaseModel) -> str | None:
    """Return the fine-tune's chat template if it differs from the base's, else None."""
    with suppress(CheckpointError):  # a model without a tokenizer
        template = load_tokenizer(finetune).chat_template
        return None if template == load_tokenizer(base).chat_template else template
    return None
