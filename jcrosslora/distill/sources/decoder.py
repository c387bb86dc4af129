"""A source that our decoder runs, and a model that computes logits for chosen columns only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel, Tokenizer, Vocabulary, pad_right
from jcrosslora.decoder import AmplifiedGenerator, AppliedAdapter, Generator, Model, divergence, forward, logits
from jcrosslora.distill.batches import DistillationBatch
from jcrosslora.distill.sources import Compared
from jcrosslora.utils.digests import sha256

_WIDTHS, _ROWS = (32, 48, 64, 80, 96, 128), 8  # shapes (B, T) of the texts that are compared
_divergence = jax.jit(divergence)
NO_TOKEN = -1
_NEVER = -1e4  # added to the logit of a column without a token: its probability is 0 in float32


@dataclass(frozen=True, eq=False)
class DecoderSource(Generator):
    """A base with an adapter, kept in `opened`; that is None for a base loaded without one."""

    opened: tuple[BaseModel, Adapter] | None = None

    @classmethod
    def of(
        cls,
        base: BaseModel,
        adapter: Adapter | None = None,
        *,
        model: Model | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> DecoderSource:
        """Load what `Generator.of` loads, with the same errors."""
        found = super().of(base, adapter, model=model, tokenizer=tokenizer)
        return found if adapter is None else dataclasses.replace(found, opened=(base, adapter))

    @property
    def ref(self) -> str:
        """What was opened."""
        return self.name

    def vocabulary(self) -> Vocabulary:
        """Return the tokens of the base."""
        assert self.opened is not None
        return self.opened[0].vocabulary()

    def identity(self) -> Any:
        """Return the digests of base and adapter."""
        assert self.opened is not None
        return [self.opened[0].digest(), digest_values(self.opened[1])]

    def alone(self) -> Generator:
        """Take the adapter off."""
        return dataclasses.replace(self, model=self.model.with_adapter(None), adapter_name=None)

    def amplified(self, strength: float, plausible: float) -> AmplifiedGenerator:
        """Amplify the change of the adapter."""
        return AmplifiedGenerator(self.model, self.tokenizer, self.name, self.adapter_name, strength, plausible)

    def compare(self, texts: Sequence[np.ndarray], starts: Sequence[int], tokens: int) -> Compared:
        """Compare predictions on answers, see `Source.compare`."""
        base, head = _without(self.model), self.model.with_adapter(None)
        figures = Compared(*np.zeros((3, len(texts))))
        # Group texts by length: a token of padding costs as much as one of text.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for first in range(0, len(order), _ROWS):
            part = order[first : first + _ROWS]
            width = next((width for width in _WIDTHS if len(texts[part[-1]]) <= width), _WIDTHS[-1])
            at, token, used = (np.zeros((_ROWS, tokens), dtype) for dtype in (np.int32, np.int32, bool))
            for row, place in enumerate(part):
                ids = texts[place]
                # An answer whose first token is joined to the prompt still has one.
                told = np.arange(min(starts[place], len(ids) - 1), len(ids))[:tokens]
                at[row, : len(told)] = row * width + np.maximum(told - 1 - max(0, len(ids) - width), 0)
                token[row, : len(told)], used[row, : len(told)] = ids[told], True
            rows = [texts[place][-width:] for place in part]  # the end of those that are longer
            batch = tuple(map(jnp.asarray, pad_right(rows, (_ROWS, width))))
            plain = _hidden(base, *batch)[at.ravel()]
            adapted = plain if self.model.adapter is None else _hidden(self.model, *batch)[at.ravel()]
            found = _divergence(head, adapted, plain, jnp.asarray(token.ravel()))
            own = used[: len(part)]
            for figure, values in zip(figures, (found.kl, -found.log_probs_b, -found.log_probs_a), strict=True):
                each = np.asarray(values, np.float64).reshape(used.shape)[: len(part)]
                figure[part] = (each * own).sum(axis=1) / own.sum(axis=1)
        return figures

    def reader(self, columns: np.ndarray, ends: int) -> DecoderReader:
        """Restrict the model to the columns; some may have `NO_TOKEN`."""
        return DecoderReader(RestrictedModel.of(self.model, columns, ends))


class DecoderReader:
    """The predictions of a restricted model with its adapter and without."""

    complete = True

    def __init__(self, adapted: RestrictedModel) -> None:
        self._adapted = adapted
        self._base = RestrictedModel(_without(adapted.model), adapted.ends)

    def read(self, batch: DistillationBatch, own: jax.Array | None, *, base: bool) -> tuple[jax.Array, jax.Array]:
        """Predict at the positions of a batch, see `Reader.read`."""
        del own
        read = jnp.asarray(batch.tokens_src), jnp.asarray(batch.mask_src), jnp.asarray(batch.at_src)
        adapted = shared_log_probs(self._adapted, *read)
        return (shared_log_probs(self._base, *read) if base else adapted), adapted


def digest_values(adapter: Adapter) -> str:
    """Return the SHA-256 of an adapter's values."""
    leaves = jax.tree_util.tree_leaves_with_path(adapter)
    return sha256(*(part for path, leaf in leaves for part in (str(path).encode(), np.asarray(leaf).tobytes())))


def _without(model: Model) -> Model:
    """Set the adapter to zeros, so that one compiled program serves both."""
    return model.with_adapter(jax.tree.map(jnp.zeros_like, model.adapter))


@jax.jit
def _hidden(model: Model, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the hidden states of all positions, (B * T, H): one program serves any number of compared tokens."""
    hidden = forward(model, tokens, mask=mask).hidden
    return hidden.reshape(-1, hidden.shape[-1])


@flax.struct.dataclass
class RestrictedModel:
    """A model with a reduced output head: one row for each symbol of a fit.

    Attributes:
        ends: number of tokens that end a text, the last rows of the head; together they are one symbol.
    """

    model: Model
    ends: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def of(cls, model: Model, predicted: np.ndarray, ends: int = 0) -> RestrictedModel:
        """Keep the head's rows of the tokens `predicted`; a column of `NO_TOKEN` has no probability."""
        params, rows, none = model.params, np.maximum(predicted, 0), predicted == NO_TOKEN
        bias = None if params.head_bias is None else params.head_bias[rows]
        if none.any():
            bias = jnp.where(none, jnp.float32(_NEVER), 0.0 if bias is None else bias.astype(jnp.float32))
        params = dataclasses.replace(params, head=params.output_head[rows], head_bias=bias)
        return cls(dataclasses.replace(model, params=params), ends)

    def with_adapter(self, adapter: AppliedAdapter | None) -> RestrictedModel:
        """Return the same base with another adapter, or alone."""
        return RestrictedModel(self.model.with_adapter(adapter), self.ends)


@partial(jax.jit, static_argnames="remat")
def shared_log_probs(
    restricted: RestrictedModel, tokens: jax.Array, mask: jax.Array, at: jax.Array, *, remat: bool = False
) -> jax.Array:
    """Return float32 (P, V): log-probabilities of the next symbol over the head's, at flat positions (P,).

    The end of a text is one symbol.
    """
    hidden = forward(restricted.model, tokens, mask=mask, remat=remat).hidden
    states = hidden.reshape(-1, hidden.shape[-1])[at]
    scores, ends = logits(restricted.model, states), restricted.ends
    if ends > 1:
        end = jax.nn.logsumexp(scores[:, -ends:], axis=-1, keepdims=True)
        scores = jnp.concatenate([scores[:, :-ends], end], axis=-1)
    return jax.nn.log_softmax(scores, axis=-1)
