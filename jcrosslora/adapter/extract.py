"""Extract a LoRA from a full fine-tune and its base: the truncated SVD of W_finetune - W_base, module by module.

By Eckart and Young (1936) it is the nearest update of its rank in the Frobenius norm.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter.changes import (
    EMBEDDING,
    HEAD,
    MODULES,
    TIED,
    ReplacedTensors,
    TokenUpdate,
    changed_rows,
    complete_rows,
)
from jcrosslora.adapter.difference import Leading, Rest, check_alike, module_differences, rest_of, stored_shapes
from jcrosslora.adapter.extract_settings import ExtractSettings
from jcrosslora.adapter.folder import CHAT_TEMPLATE
from jcrosslora.adapter.fused import split_fused
from jcrosslora.adapter.names import ending
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.adapter.save import save_adapter
from jcrosslora.checkpoint import BaseModel, describe_base, load_tokenizer, open_base
from jcrosslora.checkpoint.base import base_digest
from jcrosslora.checkpoint.hub import local_names, public_name, publish
from jcrosslora.errors import AdapterError, CheckpointError
from jcrosslora.utils import version
from jcrosslora.utils.progress import track


def extract(finetune: Any, base: Any, settings: ExtractSettings = ExtractSettings()) -> Adapter:  # noqa: B008
    """Extract a LoRA of `base` from a model that was trained from it, by the truncated SVD of each weight's difference.

    Args:
        finetune: the trained model, opened, or what `open_base` opens, as is `base`.

    Returns:
        The adapter, in float32; `info.read_as` and `info.ignored` say what of the difference it does not hold.

    Raises:
        CheckpointError: a model cannot be read, or the two have other tensors or shapes.
        AdapterError: the two have the same weights in all linear modules.
    """
    return extract_with_figures(finetune, base, settings).adapter


def extract_with_figures(finetune: Any, base: Any, settings: ExtractSettings) -> "Extracted":
    """Extract a LoRA as `extract` does, with the figures of each module."""
    finetune, base = open_base(finetune), open_base(base)
    notes = tuple(filter(None, (check_alike(finetune, base), _rounding(finetune, base))))
    shapes, found = stored_shapes(base), dict[str, Leading]()
    with track(len(shapes), "extract", "modules") as bar:
        for name, leading in module_differences(finetune, base, shapes, settings.limit):
            if leading.energy:
                found = settings.choose(found, name, leading)
            bar.update()
    if not any(len(one.s) for one in found.values()):
        why = f"not one rank fits {settings.rule}" if found else "they have the same weights in all linear modules"
        msg = f"there is no update to extract from {finetune.name} and {base.name}: {why}: give a fine-tune and the "
        raise AdapterError(msg + ("base that it was trained from" if not found else "base, and a larger budget"))
    modules = {name: found[name] for name in shapes if name in found}
    return Extracted(finetune, base, settings, modules, rest_of(finetune, base), notes)


@dataclass(frozen=True, eq=False)
class Extracted:
    """What was extracted, and how much of the difference of the two models it holds.

    Attributes:
        modules: of each linear module whose weights differ, as the base stores it, what is kept.
        rest: of tensors outside linear modules that differ, by kind and name, ||dT||_F^2.
        notes: what else there is to know, one sentence each.
    """

    finetune: BaseModel
    base: BaseModel
    settings: ExtractSettings
    modules: Mapping[str, Leading]
    rest: Mapping[Rest, Mapping[str, float]]
    notes: tuple[str, ...]

    @cached_property
    def shares(self) -> dict[str, float]:
        """The share of each kind of `rest`, and of "modules", in the whole difference's squared Frobenius norm."""
        sizes = {"modules": math.fsum(one.energy for one in self.modules.values())}
        sizes |= {kind: math.fsum(tensors.values()) for kind, tensors in self.rest.items()}
        return {kind: size / math.fsum(sizes.values()) for kind, size in sizes.items()}

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The figures of each kind of module, the last those of all.

        `share` is that of all modules' energy (the squared Frobenius norm of D); `kept` the share of its own energy
        that the ranks hold; `error` is ||D - B A||_F / ||D||_F.
        """
        kinds: dict[str, list[Leading]] = defaultdict(list)
        for name, one in self.modules.items():
            kinds[ending(name)].append(one)
        every = list(self.modules.values())
        whole = math.fsum(one.energy for one in every)
        rows = []
        for kind, items in {**kinds, "all": every}.items():
            energy, ranks = math.fsum(one.energy for one in items), [len(one.s) for one in items]
            kept = min(math.fsum(one.energy * one.kept for one in items) / energy, 1.0)
            figures = {"share": energy / whole, "kept": kept, "error": math.sqrt(1 - kept)}
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

    def _replaced(self) -> Iterator[ReplacedTensors]:
        for kind, form in (("norms", "full"), ("biases", "bias")):
            if kind in self.settings.keep and kind in self.rest:
                tensors = {name: np.asarray(self.finetune.tensor(name)) for name in self.rest[kind]}
                yield ReplacedTensors(form, tensors, self.shares[kind])

    def _tokens(self) -> Iterator[TokenUpdate]:
        if "embeddings" not in self.settings.keep or "embeddings" not in self.rest:
            return
        size, base = math.fsum(self.rest["embeddings"].values()), self.base
        ids = np.arange(min(self.finetune.dims.vocab, base.dims.vocab))
        tables = (TIED,) if self.finetune.tied and base.tied else (EMBEDDING, HEAD)
        rows = {table: self.finetune.rows(f"{MODULES[table][0]}.weight", ids) for table in tables}
        found = [changed_rows(table, "full", base, ids, new) for table, new in rows.items()]
        for one in complete_rows([one for one in found if len(one.ids)], base):
            yield replace(one, share=self.shares["embeddings"] * one.energy / size)

    def save(self, out: Path, overwrite: bool = False) -> Path:
        """Write the adapter as a PEFT folder; what it was extracted from goes to the header of its weights, as JSON.

        Where modules have ranks of their own, or more than LoRA is kept, it is profile peft, else portable.

        Raises:
            OutputError: the folder exists already, or cannot be written.
        """
        models = {"finetune": self.finetune, "base": self.base}
        named = {
            role: {"name": one.name, "revision": one.revision, "digest": base_digest(one)}
            for role, one in models.items()
        }
        paths = local_names(*(name for one in models.values() for name in (one.name, one.ref)))
        made = publish({"version": version(), **named, **self.to_json()}, paths)
        template = self.adapter.info.chat_template
        return save_adapter(
            self.adapter,
            out,
            base=describe_base(self.base, digest=named["base"]["digest"]),
            profile="peft" if self.settings.mixed or self.settings.keep else "portable",
            dtype=self.settings.dtype,
            overwrite=overwrite,
            documents={} if template is None else {CHAT_TEMPLATE: template},
            metadata={"jcrosslora.extract": json.dumps(made)},
        )


def _rounding(finetune: BaseModel, base: BaseModel) -> str | None:
    """Say that the two are stored in different number formats, whose rounding is part of the difference."""
    formats = [", ".join(sorted({module.dtype for module in one.modules.values()})) for one in (finetune, base)]
    if formats[0] == formats[1]:
        return None
    return f"the fine-tune is stored as {formats[0]}, the base as {formats[1]}: the difference holds their rounding"


def _own_template(finetune: BaseModel, base: BaseModel) -> str | None:
    """Return the chat template of a fine-tune whose base has another, or none."""
    with suppress(CheckpointError):  # a model without a tokenizer
        template = load_tokenizer(finetune).chat_template
        return None if template == load_tokenizer(base).chat_template else template
    return None
