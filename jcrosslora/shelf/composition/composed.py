"""Several adapters of one base at once: generate, score, train, write."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jcrosslora.adapter import Adapter, save_adapter
from jcrosslora.adapter.contents import safetensors_bytes
from jcrosslora.adapter.truncation import RankRule, truncate_fused
from jcrosslora.checkpoint import BaseModel, MappedFile, Tokenizer, describe_base
from jcrosslora.checkpoint.base import base_digest
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.decoder import Generator, Model, Written
from jcrosslora.errors import OutputError, UsageError, not_finite
from jcrosslora.evaluate import Example, read_examples
from jcrosslora.evaluate.examples import as_completion
from jcrosslora.shelf.composition.composition import ComposedAdapter, Composition
from jcrosslora.shelf.composition.fit import Trained, answer_log_probs, loss_and_gradient, sum_by_answer
from jcrosslora.text import Prompt
from jcrosslora.text.completion import Asked, as_prompts
from jcrosslora.text.reading import template_of
from jcrosslora.training import Batch, TrainingSettings, encode
from jcrosslora.training.run import train
from jcrosslora.utils.files import atomic_folder, output_path
from jcrosslora.utils.progress import track

FACTS, ARRAYS, ADAPTERS = "composition.json", "composition.safetensors", "adapters"
FORM = 1
# (P, N) for P prompts and N adapters, or (N,) for all prompts; or a function of the prompts that returns one of them,
# such as a retrieval. None is 1 for every adapter.
Weights: TypeAlias = ArrayLike | Callable[[Sequence[Prompt]], ArrayLike] | None

# Loss of the same batch of six adapters after 52 steps, gated and router: 0.31 and 0.18 nats; at 0.001 0.75 and 0.70.
RATE = 0.01


@dataclass(frozen=True, eq=False)
class Composed:
    """A base with several adapters; made by `compose`.

    Every method takes `weights`: non-negative numbers for the N adapters, of shape (N,) for all prompts or (P, N) with
    a row for each; or a function of the prompts that returns them. The composition decides what they mean. None is 1
    for all. If all weights of a prompt are 0, the base answers alone.

    Attributes:
        adapters: N adapters of the base, the updates of fused modules split.
        updates: the adapters as the decoder applies them.
    """

    base: BaseModel
    adapters: tuple[Adapter, ...]
    how: Composition
    updates: ComposedAdapter
    model: Model
    tokenizer: Tokenizer

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(adapter.info.name for adapter in self.adapters)

    def other_templates(self) -> list[str]:
        """Name the adapters that were fitted to another chat template than that of the base, a sentence each."""
        return [
            f"{one.info.name}: was fitted to another chat template: open {self.base.name} with the chat_template.jinja "
            "next to the adapter for conversations (--template)"
            for one in self.adapters
            if one.info.chat_template not in (None, template_of(self.tokenizer))
        ]

    def __repr__(self) -> str:
        return f"Composed({self.how}, {self.base.name!r}, {', '.join(map(repr, self.names))})"

    def generate(self, prompts: Asked | Sequence[Asked], **settings: Any) -> list[str]:
        """Return what `write` writes after each prompt, as text."""
        return [one.text for one in self.write(prompts, **settings)]

    def write(
        self,
        prompts: Asked | Sequence[Asked],
        *,
        weights: Weights = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Written]:
        """Continue prompts; prompts with different weights share batches and compiled programs.

        Args:
            prompts: one or several: texts, which are continued unchanged, or conversations,
                [{"role", "content"}, ...], which are read in the base's chat template. Only the last 2,048 tokens of
                each are read.
            max_new_tokens: the most tokens to write after each prompt.
            temperature: 0 decodes greedily.

        Raises:
            UsageError: invalid weights, a number out of range, or a conversation that the template refuses.
            AdapterError: predictions are not finite.
        """
        if max_new_tokens < 1 or not 0 <= temperature < float("inf") or not 0 <= seed < 1 << 32:
            came = f"max_new_tokens {max_new_tokens}, temperature {temperature} and seed {seed}"
            raise UsageError(
                f"{came}: expected 1 token or more, a temperature from 0 on, and a seed from 0 to 2^32 - 1"
            )
        asked = as_prompts(prompts)
        shares = _shares_of(self.how, weights, asked, len(self.adapters))
        model, names = self.model.with_adapter(self.updates), (self.base.ref, " with ".join(self.names))
        generator = _ComposedGenerator(model, self.tokenizer, *names, shares)
        with track(len(asked), "write", "prompts") as bar:
            return generator.write(asked, max_new_tokens, temperature, jax.random.key(seed), bar=bar)

    def score(self, examples: Sequence[Example] | str | Path, *, weights: Weights = None) -> np.ndarray:
        """Return the log-likelihood of each example's right answer, float64 (P,), nats.

        `examples` are at least one, or the JSONL file of them (see `read_examples`).

        Raises:
            UsageError: no example, an answer without any token, or invalid weights.
            AdapterError: log-probabilities are not finite.
        """
        found = read_examples(examples) if isinstance(examples, str | Path) else list(examples)
        if not found:
            raise UsageError("no examples: give at least one")
        shares = _shares_of(self.how, weights, [as_completion(one).prompt for one in found], len(self.adapters))

        def log_probs(members: np.ndarray, batch: Batch) -> jax.Array:
            return answer_log_probs(self.model.with_adapter(self.updates.with_shares(shares[members])), batch)

        sums = sum_by_answer([encode(self.tokenizer, one) for one in found], log_probs)
        if not np.isfinite(sums).all():
            raise not_finite(self.base.ref, " with ".join(self.names), values="log-probabilities")
        return sums

    def fit(
        self,
        examples: Sequence[Sequence[Example] | str | Path],
        settings: TrainingSettings = TrainingSettings(rate=RATE),  # noqa: B008
    ) -> Composed:
        """Train the gate, the router or the magnitudes on texts that belong to one adapter each.

        Base and adapters do not change. With all adapters active, the predictions on the answer of a text should be
        those of the adapter that the text belongs to: the loss is the mean KL divergence from them. No labels are
        needed; the texts may be what each adapter writes itself (`generate` with weights 1 for it and 0 for others).
        Returns the trained composition; this one does not change.

        Args:
            examples: for each adapter, in order, examples or the JSONL file of them (see `read_examples`); an empty
                list for an adapter without any.
            settings: of the training; rank, alpha and modules are not used. `RATE` is ten times that of a LoRA.

        Raises:
            UsageError: a composition without anything to train, settings out of range, another number of entries than
                of adapters, no example at all, or a loss that is not finite.
        """
        if not self.how.trained:
            raise UsageError(f"{self.how.name} has nothing to train: take gated, router or stack")
        if len(examples) != len(self.adapters):
            msg = f"examples of {len(examples)} adapters for {len(self.adapters)}: give one entry for each, in order"
            raise UsageError(msg)
        texts = [read_examples(each) if isinstance(each, str | Path) else list(each) for each in examples]
        settings.check()
        owners = np.repeat(np.arange(len(texts), dtype=np.int32), [len(each) for each in texts])

        def gradient_of(arrays: Trained, batch: Batch) -> tuple[jax.Array, Trained]:
            of_batch = jnp.asarray(owners[np.asarray(batch.members)])
            return loss_and_gradient(self.model, self.updates, arrays, batch, of_batch, settings.remat)

        # Training donates the buffers of its arrays, and these belong to this composition.
        start = {role: jax.tree.map(jnp.array, one.arrays) for role, one in self.updates.roles.items()}
        joined = [one for each in texts for one in each]
        arrays = train(self.base, joined, settings, start, gradient_of, tokenizer=self.tokenizer)
        return dataclasses.replace(self, updates=self.updates.with_arrays(arrays))

    def as_adapter(self, weights: Weights = None, *, out_rank: RankRule | None = None) -> Adapter:
        """Make one adapter that does the same as all with these weights; not for `gated` and `router`.

        Of `mixture`, `uniform` and `stack` the ranks add up, and `select` is the adapter itself.

        `weights` are (N,). `out_rank` cuts every update to its best approximation of a lower rank: a rank, a share of
        its energy such as 0.99, or "auto"; `info.read_as` and `info.lost` say what that loses.

        Raises:
            UsageError: invalid weights or rank, or a composition that depends on the text.
        """
        (shares,) = _shares_of(self.how, weights, [""], len(self.adapters))
        if not shares.any():
            raise UsageError("all weights are 0, which is the base alone: give a weight above 0")
        arrays = {name: np.asarray(array) for name, array in self.updates.by_module(self.base).items()}
        adapter = self.how.as_adapter(self.adapters, shares.tolist(), arrays)
        if out_rank is None:
            return adapter
        adapter, truncation = truncate_fused(adapter, self.base.fused, out_rank)
        assert truncation is not None
        info = dataclasses.replace(adapter.info, read_as=f"cut to {truncation.sentence}", lost=1 - truncation.kept)
        return dataclasses.replace(adapter, info=info)

    def save_adapter(
        self, out: str | Path, weights: Weights = None, *, out_rank: RankRule | None = None, overwrite: bool = False
    ) -> Adapter:
        """Write `as_adapter` as a PEFT folder that engines read; returns the adapter.

        Raises OutputError if the folder exists already, or cannot be written.
        """
        adapter = self.as_adapter(weights, out_rank=out_rank)
        save_adapter(adapter, out, base=describe_base(self.base, digest=""), overwrite=overwrite)
        return adapter

    def save(self, out: str | Path) -> Path:
        """Write the composition as a new folder, completely or not at all; `load_composition` reads it.

            composition.json           form, composition and its settings, base, and the adapters in their order
            composition.safetensors    MODULE.ARRAY -> float32, of every module that any adapter updates, if trained
            adapters/0, adapters/1     PEFT folders, so that nothing else is needed but the base

        Raises OutputError if the folder exists already, or cannot be written.
        """
        out = output_path(Path(out))
        if os.path.lexists(out):
            msg = f"{out}: exists already: choose another output for the composition, or remove it yourself"
            raise OutputError(msg)
        facts = {
            "form": FORM,
            "composition": self.how.name,
            "settings": dataclasses.asdict(self.how),
            "base": public_name(self.base.name),
            "base_digest": base_digest(self.base),
            "prefix": self.base.prefix,
            "adapters": [public_name(name) for name in self.names],
        }
        arrays = {name: np.asarray(array) for name, array in self.updates.by_module(self.base).items()}
        info = describe_base(self.base, digest="")
        with atomic_folder(out) as folder:
            for number, adapter in enumerate(self.adapters):
                save_adapter(adapter, folder / ADAPTERS / str(number), base=info)
            if arrays:
                (folder / ARRAYS).write_bytes(safetensors_bytes(arrays, {"format": "pt"}))
            facts["digests"] = digests_of(folder)
            (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return out


def digests_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of every file of a composition but its settings, by its path in the folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FACTS)
    return {path.relative_to(folder).as_posix(): MappedFile(path).sha256() for path in paths}


@dataclass(frozen=True, eq=False)
class _ComposedGenerator(Generator):
    """Generates with composed adapters; `shares` (P, N) are those of the P prompts that `write` gets, in order."""

    shares: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def of_rows(self, places: Sequence[int], rows: int) -> Self:
        adapter = self.model.adapter
        assert isinstance(adapter, ComposedAdapter)
        batch = np.zeros((rows, self.shares.shape[1]), np.float32)
        batch[: len(places)] = self.shares[list(places)]
        return dataclasses.replace(self, model=self.model.with_adapter(adapter.with_shares(batch)))

    @property
    def shares_beginnings(self) -> bool:
        """False: a beginning that is read once has no shares, as each of its prompts has different ones."""
        return False


def _shares_of(how: Composition, weights: Weights, prompts: Sequence[Prompt], count: int) -> np.ndarray:
    """Return the shares of N adapters for each of P prompts, float32 (P, N), see `Composition.shares`.

    Raises UsageError for another shape, a weight that is negative or not finite, or none if the composition needs them.
    """
    if weights is None and how.needs_weights and count > 1:
        msg = f"{how.name} with {count} adapters and no weights: give a weight of each, such as 1 for the one to use "
        raise UsageError(msg + "and 0 for the others")
    given = weights(prompts) if callable(weights) else np.ones(count) if weights is None else weights
    try:
        found = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(f"weights are {str(given)[:60]!r}: expected a number for each of {count} adapters") from error
    if found.shape not in ((count,), (len(prompts), count)):
        msg = f"weights have shape {list(found.shape)}: expected [{count}], one for each adapter, or "
        raise UsageError(msg + f"[{len(prompts)}, {count}], with a row for each prompt")
    if not np.isfinite(found).all() or (found < 0).any():
        bad = found[~np.isfinite(found) | (found < 0)][0]
        raise UsageError(f"a weight is {bad:g}: expected numbers from 0 on; a row of zeros is the base alone")
    return how.shares(np.broadcast_to(found, (len(prompts), count)))
