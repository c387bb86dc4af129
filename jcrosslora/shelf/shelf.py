"""`Shelf`: a folder of adapters of one base; add adapters to it, search it, and run what is found."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter import Adapter, find_adapter, load_adapter
from jcrosslora.checkpoint import BaseModel, describe_base, open_base
from jcrosslora.checkpoint.base import base_digest
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.errors import AdapterError, CheckpointError, UsageError, suggestion
from jcrosslora.shelf import records
from jcrosslora.shelf.adding import Found, Reader, add_found, config_digest, find_adapters, largest_rank
from jcrosslora.shelf.composition import Composed, Composition, compose, find_composition
from jcrosslora.shelf.composition.ways import Select
from jcrosslora.shelf.encoders import HIDDEN, Encoder, check_encoder, open_encoder
from jcrosslora.shelf.index import HEAD, ChangedMeanwhileError, Fresh, Index
from jcrosslora.shelf.records import Added, ShelfBase, ShelfEntry, opened_place
from jcrosslora.shelf.retrieval import Retrieved, Retriever
from jcrosslora.shelf.searching import Searching
from jcrosslora.shelf.weight_probes import ProbeSettings
from jcrosslora.text.completion import Asked, as_prompts
from jcrosslora.utils.settings import checked


class Shelf:
    """A folder of adapters of one base.

    The adapters stay where they are; the folder holds an index of them, and no weights.
    """

    @checked
    def __init__(self, folder: str | Path, base: Any = None, *, encoder: str | None = None) -> None:
        """Open a shelf; create it if it is missing.

        Args:
            folder: of the shelf. If it is missing or empty, a shelf is created there, which needs `base`.
            base: the base of its adapters: a path, a hub id or an open base; None opens the base that the index names.
            encoder: for a new shelf, what makes vectors of samples: "hidden", states of the base itself, the default;
                "sentences:MODEL", a model of sentence-transformers; or "none".

        Raises:
            UsageError: no base for a new shelf, another base or encoder than that of the shelf, or a damaged shelf.
            CheckpointError: the base cannot be read.
            OutputError: the shelf cannot be written.
        """
        self.folder = Path(folder).expanduser()
        self._base: BaseModel | None = None if base is None else open_base(base)
        self._encoder: Encoder | None = None
        name = records.stored_encoder(self.folder, check_encoder(encoder or HIDDEN))
        if (self.folder / HEAD).is_file() or self._base is None:
            self._index = Index.open(self.folder)
        else:
            opened = self._base
            ref = str(opened.path or opened.ref) if opened.revision is None else opened.ref
            place, called = records.stored_place(self.folder, ref), public_name(opened.name) or opened.name
            info = ShelfBase(called, place, base_digest(opened), opened.family.name, opened.revision)
            self._index = Index.create(self.folder, info, name)
        if encoder is not None and name != self.encoder_name:
            msg = f"{self.folder}: was made with the encoder {self.encoder_name}, not {name}: make another shelf"
            raise UsageError(msg)
        if self._base is not None:
            _check_base(self._base, self.folder, self.info)

    def __repr__(self) -> str:
        """Folder, base and number of adapters, on one line."""
        return f"Shelf({str(self.folder)!r}, {self.info.name}, {len(self.names)} adapters)"

    def __len__(self) -> int:
        """Count the adapters."""
        return len(self._index.entries)

    @property
    def info(self) -> ShelfBase:
        """The index's entry of the base."""
        return self._index.head.base

    @property
    def encoder_name(self) -> str:
        """The name of the encoder of the samples."""
        return self._index.head.encoder

    @property
    def entries(self) -> tuple[ShelfEntry, ...]:
        """The index's entries of the adapters."""
        return self._index.entries

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order of all arrays over them."""
        return tuple(entry.name for entry in self._index.entries)

    @property
    def base(self) -> BaseModel:
        """The base, opened when it is first used.

        Raises CheckpointError if it has moved or cannot be read, UsageError if it is another base.
        """
        if self._base is None:
            ref = opened_place(self.folder, self.info.place)
            if ref != self.info.place and not Path(ref).exists():
                msg = f"{ref}: the base of the shelf {self.folder} is not there: give its place with --base"
                raise CheckpointError(msg)
            self._base = open_base(ref, revision=self.info.revision)
            _check_base(self._base, self.folder, self.info)
        return self._base

    def entry(self, name: str) -> ShelfEntry:
        """Return the index's entry of an adapter; raise UsageError if none has this name."""
        for entry in self._index.entries:
            if entry.name == name:
                return entry
        msg = f"{self.folder}: has no adapter {name!r}{suggestion(name, self.names)}: `jcrosslora shelf list` names all"
        raise UsageError(msg)

    def place(self, name: str) -> str:
        """Return the path or hub id of an adapter, see `entry`."""
        return opened_place(self.folder, self.entry(name).place)

    def missing(self, entry: ShelfEntry) -> bool:
        """Whether the files of an adapter are no longer where they were when it was added."""
        return not records.is_there(self.folder, entry.place)

    def load(self, name: str) -> Adapter:
        """Load an adapter.

        Raises:
            UsageError: no adapter has this name, or its files have changed since it was added.
            AdapterError: its files are missing or damaged.
        """
        entry, place = self.entry(name), self.place(name)
        if self.missing(entry):
            msg = f"{place}: the adapter {name!r} of the shelf is not there: put it back, add it where it is now, or "
            raise AdapterError(msg + f"take it off with `jcrosslora shelf remove {self.folder} {name!r}`")
        found = load_adapter(place, self.base)
        same = config_digest(find_adapter(place)) == entry.config_digest
        if found.info.digest != entry.digest or not same or largest_rank(found) != entry.rank:
            raise UsageError(f"{place}: has changed since it was put on the shelf: add it again")
        return found

    def remove(self, names: str | Sequence[str]) -> None:
        """Take adapters off the shelf; their files stay.

        Raises:
            UsageError: no adapter has one of these names; then all stay on the shelf.
            OutputError: the shelf cannot be written to.
        """
        if gone := [self.entry(name).name for name in ([names] if isinstance(names, str) else names)]:
            self._index = self._index.change([], gone)

    def add(
        self,
        adapters: str | Path | Sequence[str | Path],
        *,
        name: str | None = None,
        prompts: str | Path | None = None,
        lift: float | None = None,
    ) -> Added:
        """Add adapters, or all in a folder; damaged ones and adapters of another base are skipped and listed.

        If the work is stopped, all but the additions of the last seconds are kept; the same call continues there.

        Args:
            adapters: paths or hub ids of adapters, or folders with adapters below.
            name: of a single adapter; None takes the name of its folder, or its path below the folder that was given.
            prompts: a file of prompts of the task, its samples, see `jcrosslora shelf add --help`; None takes those
                that the source wrote when the adapter was moved.
            lift: of a single adapter, the share of a trained adapter's gain that it recovers, if known.

        Raises:
            AdapterError: an adapter or folder is missing, or has no adapter below it.
            UsageError: `name` or `lift` for several adapters, a lift that is no number, or prompts that cannot be read.
            CheckpointError: the base cannot be read.
            OutputError: the shelf cannot be written to.
        """
        refs = [adapters] if isinstance(adapters, str | Path) else list(adapters)
        found = [one for ref in refs for one in find_adapters(ref)]
        if len(found) != 1 and (name is not None or lift is not None):
            msg = f"a name or a lift was given for {len(found)} adapters: give it with one adapter at a time"
            raise UsageError(msg)
        if lift is not None and not math.isfinite(lift):
            raise UsageError(f"lift {lift}: expected a share of a trained adapter's gain, such as 0.8")
        found = [Found(name, one.ref) for one in found] if name is not None else found
        given = None if prompts is None else records.given_samples(prompts)
        info = describe_base(self.base, digest=self.info.digest)
        known = {entry.name: entry for entry in self._index.entries}

        def write(fresh: Fresh) -> None:
            self._index = self._index.change(fresh)

        reader = Reader(self.folder, self.base, info, given, lift)
        added = add_found(found, reader, known, lambda samples: self._open_encoder()(samples), write)
        if added.added:
            # For the next search; if another process has added more in the meantime, it does this.
            with suppress(ChangedMeanwhileError):
                self._searching().means()
        return added

    def search(self, prompts: Asked | Sequence[Asked], by: str | None = None) -> Retrieved:
        """Find the adapters whose task the prompts belong to.

        Args:
            prompts: a text or a conversation, or several.
            by: "text", by vectors of the samples; "tfidf", by their words; "weights", by vectors of the adapters'
                weights, see `train_probes`. None is "text", or "tfidf" on a shelf without an encoder.

        Raises:
            UsageError: an unknown way to search, one that the shelf has no data for, or no prompt.
            CheckpointError: the base cannot be read.
        """
        if not (several := as_prompts(prompts)):
            raise UsageError(f"{self.folder}: no prompt was given; give one or more")
        found = self.retriever(by)
        return Retrieved(self.names, found.scores(several), found.thresholds)

    def retriever(self, by: str | None = None) -> Retriever:
        """Open a way to search, for many searches; see `search`. Rereads an index that another process changed."""
        try:
            return self._searching().retriever(by)
        except ChangedMeanwhileError:
            self._index = Index.open(self.folder)
            return self._searching().retriever(by)

    def compose(
        self,
        prompts: Asked | Sequence[Asked],
        how: str | Composition = "mixture",
        *,
        top: int = 1,
        by: str | None = None,
        **settings: Any,
    ) -> tuple[Composed, np.ndarray]:
        """Compose the adapters that suit prompts, to run each prompt with the right ones.

            composed, weights = shelf.compose(prompts)
            composed.generate(prompts, weights=weights)

        Args:
            prompts: at least one text or conversation.
            how: with further `settings`, see `jcrosslora.compose`.
            top: the most adapters for a prompt; "select" takes the best one.

        Returns:
            The adapters that were found for any prompt, composed; and their weights for each prompt, float32 (P, N). A
            row of zeros stands for the base alone.

        Raises:
            UsageError: see `search`, `load` and `jcrosslora.compose`.
            AdapterError: an adapter is missing, damaged, or cannot be composed.
            CheckpointError: the base or its tokenizer cannot be read.
        """
        found, how = self.search(prompts, by), find_composition(how)
        weights = found.weights(1 if isinstance(how, Select) else top)
        used = np.flatnonzero(weights.any(axis=0))
        if len(used):
            return self._compose([found.names[number] for number in used], how, settings), weights[:, used]
        # With weight 0 any adapter that can be composed gives the base alone.
        *others, last = found.names
        for name in others:
            with suppress(AdapterError, UsageError):
                return self._compose([name], how, settings), weights[:, :1]
        return self._compose([last], how, settings), weights[:, :1]

    def train_probes(self, settings: ProbeSettings = ProbeSettings()) -> list[float]:  # noqa: B008
        """Train the encoder of adapters by their weights, for searches by "weights", and return each step's loss.

        An old encoder is replaced. Every step loads the weights of some adapters, and at most 1 GB of them stays in
        memory.

        Raises:
            UsageError: fewer than two adapters with samples, no encoder, or a setting out of range.
            AdapterError: an adapter cannot be read.
            OutputError: the shelf cannot be written to.
        """
        return self._searching().train(settings)

    def _searching(self) -> Searching:
        return Searching(self._index, lambda: self.base, self.load, self._open_encoder)

    def _compose(self, names: Sequence[str], how: Composition, settings: dict[str, Any]) -> Composed:
        return compose(self.base, [named(self.load(name), name) for name in names], how, **settings)

    def _open_encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = open_encoder(records.opened_encoder(self.folder, self.encoder_name), self.base)
        return self._encoder


def named(adapter: Adapter, name: str) -> Adapter:
    """Give an adapter its name on the shelf."""
    return replace(adapter, info=replace(adapter.info, name=name))


def _check_base(base: BaseModel, folder: Path, info: ShelfBase) -> None:
    digest = base_digest(base)
    if digest != info.digest:
        wanted = f"{info.name} ({info.digest[:19]}...)"
        msg = f"{base.ref}: is another base ({digest[:19]}...) than that of the shelf {folder}, {wanted}: "
        raise UsageError(msg + "give that one, or make another shelf")
