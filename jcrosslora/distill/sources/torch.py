"""A source that transformers and PEFT run on torch: any causal language model that they support."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import AdapterInfo
from jcrosslora.adapter.folder import AdapterPaths, read_config, stated_licences, stated_template
from jcrosslora.checkpoint import Tokenizer, Vocabulary, pad_right
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.decoder import Written
from jcrosslora.decoder.generate import as_written, cut_ids
from jcrosslora.distill.batches import DistillationBatch
from jcrosslora.distill.sources import Compared, TorchModel, answer_places, seeds_of
from jcrosslora.distill.sources.opening import find_peft_adapter, load_model, open_tokenizer
from jcrosslora.errors import AdapterError, not_finite
from jcrosslora.text import Prompt
from jcrosslora.text.reading import with_own_template
from jcrosslora.utils.progress import Track

_ROWS, _READ_ROWS = 16, 8  # batch sizes for writing and for reading
_SAMPLE = "Question: Which of the two is larger, the sun or the moon?\nAnswer:"  # shows whether an adapter acts


class _Model:
    """A `peft.PeftModel` on its device, and its names."""

    def __init__(self, model: Any, device: str, base_name: str, adapter_name: str) -> None:
        self.model, self.device = model, device
        self.base_name, self.adapter_name = base_name, adapter_name

    def adapter(self, *, on: bool) -> AbstractContextManager[Any]:
        """Switch the adapter on or off while the block runs."""
        return nullcontext() if on else self.model.disable_adapter()

    def log_probs(self, tokens: np.ndarray, mask: np.ndarray, *, adapter: bool) -> Any:
        """Return float32 (B, T, V) log-probabilities after every token; raise `not_finite` if they are not finite."""
        import torch

        with torch.inference_mode(), self.adapter(on=adapter):
            ids, seen = (torch.as_tensor(each, device=self.device) for each in (tokens.astype(np.int64), mask))
            # Adapters such as prompt tuning prepend positions.
            scores = self.model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits[:, -ids.shape[1] :]
            found = torch.log_softmax(scores.float(), dim=-1)
            if not torch.isfinite(found.amax(-1)[seen]).all():
                raise not_finite(self.base_name, self.adapter_name if adapter else None)
        return found


class TorchWriter:
    """The base with its adapter, or the base alone, as a writer."""

    def __init__(self, model: _Model, tokenizer: Tokenizer, name: str, *, adapter: bool) -> None:
        self.tokenizer, self.name = tokenizer, name
        self._model, self._adapter = model, adapter

    def write(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float,
        key: jax.Array,
        *,
        bar: Track | None = None,
    ) -> list[Written]:
        """Answer prompts, see `Writer.write`; only the last 2,048 tokens of each are read."""
        import torch

        ids = cut_ids(self.tokenizer, prompts)
        found = [Written("", 0, False)] * len(ids)
        devices = [self._model.device] if self._model.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(seeds_of(key, 1)[0]))
            for places in self._groups(ids):
                rows = self._continue([ids[place] for place in places], max_new_tokens, temperature)
                for place, row in zip(places, rows, strict=True):
                    found[place] = as_written(self.tokenizer, ids[place], row)
                if bar is not None:
                    bar.update(len(places))
        return found

    def _groups(self, ids: Sequence[np.ndarray]) -> list[list[int]]:
        """Put prompts of similar length together."""
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        return [order[start : start + _ROWS] for start in range(0, len(order), _ROWS)]

    def _continue(self, prompts: Sequence[np.ndarray], count: int, temperature: float) -> list[np.ndarray]:
        import torch

        width = max(map(len, prompts))
        tokens, mask = pad_right([row[::-1] for row in prompts], (len(prompts), width))
        ids, seen = (
            torch.as_tensor(each[:, ::-1].copy(), device=self._model.device) for each in (tokens.astype(np.int64), mask)
        )
        stops = list(self.tokenizer.stops)
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode(), self._model.adapter(on=self._adapter):
            found = self._model.model.generate(
                input_ids=ids,
                attention_mask=seen.long(),
                max_new_tokens=count,
                eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else 0,
                logits_processor=[self._scores],
                **(sampled if temperature > 0 else {"do_sample": False}),
            )
        rows = found[:, width:].cpu().numpy().astype(np.int32)
        # Up to and including the first token that ends a text.
        ends = [np.flatnonzero(np.isin(row, stops)) for row in rows]
        return [row[: end[0] + 1 if end.size else None] for row, end in zip(rows, ends, strict=True)]

    def _scores(self, ids: Any, scores: Any) -> Any:
        """Check the logits of the next token."""
        import torch

        del ids
        if not torch.isfinite(scores.amax(-1)).all():
            raise not_finite(self._model.base_name, self._model.adapter_name if self._adapter else None)
        return scores


class AmplifiedTorchWriter(TorchWriter):
    """The base with the change that its adapter makes amplified, see `AmplifiedGenerator`."""

    def __init__(self, model: _Model, tokenizer: Tokenizer, name: str, strength: float, plausible: float) -> None:
        super().__init__(model, tokenizer, name, adapter=True)
        self._strength, self._plausible = strength, plausible

    def _groups(self, ids: Sequence[np.ndarray]) -> list[list[int]]:
        """Put prompts of one length together, as the base reads them without padding."""
        lengths = sorted(set(map(len, ids)))
        groups = [[place for place, row in enumerate(ids) if len(row) == length] for length in lengths]
        return [group[start : start + _ROWS] for group in groups for start in range(0, len(group), _ROWS)]

    def _scores(self, ids: Any, scores: Any) -> Any:
        """Amplify the logits of the next token; the base reads the whole text again."""
        import torch

        scores = super()._scores(ids, scores)
        with self._model.adapter(on=False):
            base = self._model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        least = scores.amax(-1, keepdim=True) + (math.log(self._plausible) if self._plausible else -math.inf)
        return torch.where(scores >= least, scores + self._strength * (scores - base.float()), -math.inf)


class TorchSource(TorchWriter):
    """A base with its adapter, by their paths or hub ids."""

    how = "run by transformers and PEFT"

    def __init__(
        self, model: _Model, tokenizer: Tokenizer, vocabulary: Vocabulary, source: TorchModel, adapter: AdapterInfo
    ) -> None:
        super().__init__(model, tokenizer, model.base_name, adapter=True)
        self.ref, self.adapter_name, self.adapter = model.base_name, model.adapter_name, adapter
        rank = adapter.config.get("r")
        self.rank = rank if type(rank) is int else None
        self._vocabulary, self._source = vocabulary, source

    @classmethod
    def open(cls, source: TorchModel, adapter: str | Path, *, revision: str | None = None) -> TorchSource:
        """Load a base and an adapter, a folder of PEFT or a hub id with its revision, and check that the adapter acts.

        Errors are those of `load_model`, and AdapterError if the adapter changes nothing.
        """
        files = find_peft_adapter(adapter, revision)
        digest = f"sha256:{hashlib.sha256(files.weights.read_bytes()).hexdigest()}"
        model, device = load_model(source, files)
        vocab = int(model.get_input_embeddings().weight.shape[0])
        tokenizer, vocabulary = open_tokenizer(
            source.tokenizer or source.ref, revision=source.revision, chat_template=source.chat_template, vocab=vocab
        )
        if source.chat_template is None:
            tokenizer = with_own_template(tokenizer, stated_template(files.folder))
        loaded = _Model(model, device, str(source.ref), str(adapter))
        found = cls(loaded, tokenizer, vocabulary, source, _describe(files, digest, revision))
        found._check_acts()
        return found

    def vocabulary(self) -> Vocabulary:
        """Return the tokens of the base."""
        return self._vocabulary

    def check_same(self) -> None:
        """Return None: the model in memory stays as it is."""

    def identity(self) -> Any:
        """Return the names of the base and a digest of the adapter."""
        return ["torch", self.ref, self._source.revision, self.adapter.digest]

    def settings(self) -> dict[str, Any]:
        """Return the settings that query it again, by name."""
        tokenizer = self._source.tokenizer
        return {
            "source_backend": "torch",
            "source_tokenizer": public_name(None if tokenizer is None else str(tokenizer)),
        }

    def alone(self) -> TorchWriter:
        """Return the base without its adapter."""
        return TorchWriter(self._model, self.tokenizer, self.name, adapter=False)

    def amplified(self, strength: float, plausible: float) -> AmplifiedTorchWriter:
        """Return the base with the change of its adapter amplified."""
        return AmplifiedTorchWriter(self._model, self.tokenizer, self.name, strength, plausible)

    def compare(self, texts: Sequence[np.ndarray], starts: Sequence[int], tokens: int) -> Compared:
        """Compare predictions on answers, see `Source.compare`."""
        import torch

        figures = Compared(*np.zeros((3, len(texts))))
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for first in range(0, len(order), _READ_ROWS):
            part = order[first : first + _READ_ROWS]
            batch = pad_right([texts[place] for place in part], (len(part), max(len(texts[place]) for place in part)))
            adapted, plain = (self._model.log_probs(*batch, adapter=on) for on in (True, False))
            for row, place in enumerate(part):
                ids = texts[place]
                where = answer_places(ids, starts[place], tokens)
                one, other = (each[row, where - 1].double() for each in (adapted, plain))
                told = np.arange(len(where)), ids[where]
                figures.change[place] = float(torch.nan_to_num(one.exp() * (one - other), nan=0.0).sum(-1).mean())
                figures.base_nll[place] = float(-other[told].mean())
                figures.adapted_nll[place] = float(-one[told].mean())
        return figures

    def reader(self, columns: np.ndarray, ends: int) -> TorchReader:
        """Prepare predictions on columns."""
        return TorchReader(self._model, columns, ends)

    def _check_acts(self) -> None:
        ids = self.tokenizer.encode(_SAMPLE).ids[None]
        adapted, plain = (self._model.log_probs(ids, ids >= 0, adapter=on) for on in (True, False))
        if bool((adapted == plain).all()):
            msg = f"{self.adapter_name}: changes nothing in the predictions of {self.ref}: check that it was trained, "
            raise AdapterError(msg + "and on this base")


class TorchReader:
    """Predictions on chosen columns."""

    complete = True

    def __init__(self, model: _Model, columns: np.ndarray, ends: int) -> None:
        self._model, self._columns, self._ends = model, columns.astype(np.int64), ends

    def read(self, batch: DistillationBatch, own: jax.Array | None, *, base: bool) -> tuple[jax.Array, jax.Array]:
        """Predict at the positions of a batch, see `Reader.read`."""
        del own
        adapted = self._predict(batch, adapter=True)
        return (self._predict(batch, adapter=False) if base else adapted), adapted

    def _predict(self, batch: DistillationBatch, *, adapter: bool) -> jax.Array:
        import torch

        filled = batch.mask_src.any(axis=1)
        found = self._model.log_probs(batch.tokens_src[filled], batch.mask_src[filled], adapter=adapter)
        row, place = np.divmod(batch.at_src.astype(np.int64), batch.tokens_src.shape[1])
        row = np.minimum(np.cumsum(filled)[row] - 1, int(filled.sum()) - 1)
        scores = found[row, place][:, self._columns]
        if self._ends > 1:
            end = torch.logsumexp(scores[:, -self._ends :], -1, keepdim=True)
            scores = torch.cat([scores[:, : -self._ends], end], -1)
        return jnp.asarray(torch.log_softmax(scores, -1).cpu().numpy())


def _describe(files: AdapterPaths, digest: str, revision: str | None) -> AdapterInfo:
    """Read what an adapter's configuration and card say about it."""
    config = {} if files.config is None else read_config(files.config)
    base = config.get("base_model_name_or_path")
    return AdapterInfo(
        name=files.name,
        base_name=base if isinstance(base, str) else None,
        config=config,
        form=files.form,
        digest=digest,
        revision=revision,
        kind=str(config.get("peft_type", "LoRA")),
        **stated_licences(files),
    )
