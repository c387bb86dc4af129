"""Retrieval by certainty, a control: how much an adapter changes what the base predicts at the end of a prompt.

It needs no encoder, but an adapter of a format changes its base wherever an answer may begin, whatever the prompt is
about (docs/shelf.md has figures). Adapters differ in size, so that each one's change is divided by its mean change on
samples of the whole shelf. Nothing is kept of it: every adapter is loaded and run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import fast_dtype, load_params
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.sources.tokenizer import with_own_template
from jcrosslora.shelf.records import ShelfEntry
from jcrosslora.shelf.retrieval.thresholds import thresholds_of
from jcrosslora.shelf.sampling import spread
from jcrosslora.text import Message, Prompt
from jcrosslora.text.reading import prompt_ids
from jcrosslora.utils.progress import track

NAME = "certainty"
_PREDICTIONS = 16  # at the end of a prompt, the answer's first token among them
_BACKGROUND = 16  # samples of the whole shelf
_OWN = 8  # samples of an adapter, for its threshold
_LEAST = 1e-6  # nats; an adapter that changes less changes nothing


class CertaintyRetriever:
    """Searches by running every adapter on the prompt."""

    name: ClassVar[str] = NAME

    def __init__(self, base: BaseModel, entries: Sequence[ShelfEntry], load: Callable[[str], Adapter]) -> None:
        """Run every adapter on samples.

        Args:
            base: of all adapters.
            entries: of the shelf.
            load: loads an adapter by its name.

        Raises:
            UsageError, AdapterError, CheckpointError: the base or an adapter cannot be read or run.
        """
        self._base, self._entries, self._load = base, entries, load
        self._tokenizer, self._params = load_tokenizer(base), load_params(base, fast_dtype())
        samples = [(place, one) for place, entry in enumerate(entries) for one in entry.samples]
        background = spread(samples, _BACKGROUND)
        self._usual = np.ones(len(entries))
        own = []
        for place, source in self._sources("measure adapters on samples"):
            changes = self._changes(source, entries[place], [one for _, one in background])
            # Its own samples would make its usual change large, and the fewer adapters there are, the larger.
            foreign = [change for change, (owner, _) in zip(changes, background, strict=True) if owner != place]
            self._usual[place] = np.mean(foreign) if foreign else 1.0
            mine = spread(entries[place].samples, _OWN)
            own.append(self._scores(place, self._changes(source, entries[place], mine)))
        self.thresholds = thresholds_of(own)

    def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return float32 (P, N): log of an adapter's change on a prompt over its usual change."""
        found = np.zeros((len(prompts), len(self._entries)), np.float32)
        for place, source in self._sources("run adapters on prompts"):
            found[:, place] = self._scores(place, self._changes(source, self._entries[place], prompts))
        return found

    def _sources(self, description: str) -> Iterator[tuple[int, DecoderSource]]:
        with track(len(self._entries), description, "adapters") as bar:
            for place, entry in enumerate(self._entries):
                adapter = self._load(entry.name)
                tokenizer = with_own_template(self._tokenizer, adapter.info.chat_template)
                yield place, DecoderSource.of(self._base, adapter, params=self._params, tokenizer=tokenizer)
                bar.update()

    def _changes(self, source: DecoderSource, entry: ShelfEntry, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return KL(with adapter || base), float64 (P,), over the last predictions of each prompt, in nats."""
        if not prompts:
            return np.zeros(0)
        ids = [prompt_ids(source.tokenizer, _as_asked(prompt, entry)) for prompt in prompts]
        # The token behind a prompt stands for the prediction of the answer's first token; it is not looked at.
        texts = [np.append(row, np.int32(0)) for row in ids]
        starts = [max(1, len(text) - _PREDICTIONS) for text in texts]
        return source.compare(texts, starts, _PREDICTIONS)[0]

    def _scores(self, place: int, changes: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(changes, _LEAST) / max(self._usual[place], _LEAST)).astype(np.float32)


def _as_asked(prompt: Prompt, entry: ShelfEntry) -> Prompt:
    """Read a text as the message of a user where an adapter's own samples are conversations."""
    chats = any(not isinstance(one, str) for one in entry.samples)
    return (Message("user", prompt),) if chats and isinstance(prompt, str) else prompt
