"""The model class for lm-evaluation-harness."""

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import jax

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.adapter.records import left_out
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import Generator, Model, load_model, stack_adapters
from jcrosslora.decoder.model import RUN
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import harness_requests as harness
from jcrosslora.evaluate.harness_requests import ModelSettings, Options, Pair
from jcrosslora.evaluate.log_probs import Models
from jcrosslora.utils.progress import show_progress, track

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    _MISSING = f"lm-evaluation-harness models need the lm_eval package ({error}): pip install 'jcrosslora[eval]'"
    raise UsageError(_MISSING) from error

_LOG = logging.getLogger(__name__)


@register_model("jcrosslora")
class JCrossLoRALM(TemplateLM):
    """A base, alone or with an adapter, run by the package's own decoder.

    Text is tokenized as by the harness's `hf` model: spaces at the end of a context belong to the continuation, whose
    tokens are those that the whole has beyond the context's. A context that is too long loses tokens at its start. One
    difference: the bos that some tokenizers put in front is not scored by `loglikelihood_rolling`. Changes of the
    embedding and of the output head are not applied, which is logged.
    """

    def __init__(
        self,
        base: str | Path | BaseModel,
        adapter: str | Path | Adapter | None = None,
        model: Model | None = None,
        **settings: Any,
    ) -> None:
        """Load the weights.

        Args:
            base: a folder of safetensors, a GGUF file, a hub id, or an open base.
            adapter: of this base, applied unmerged: a folder, a hub id, or a loaded adapter; None for the base alone.
            model: the base, if it is loaded already (`jcrosslora.decoder.load_model`); then `dtype` is not used.
            settings: the fields of `ModelSettings`.

        Raises:
            UsageError: a setting out of range.
            CheckpointError: the base or its tokenizer cannot be read.
            AdapterError: the adapter cannot be read, or does not fit the base.
        """
        super().__init__()
        self.settings = ModelSettings(**settings)
        self.base = open_base(base)
        stated, given = self.base.config.get("max_position_embeddings"), self.settings.max_length
        self.max_length = harness.positive("max_length", stated if given is None else given)
        self.adapter = adapter if adapter is None or isinstance(adapter, Adapter) else load_adapter(adapter, self.base)
        if self.adapter is not None:
            for sentence in left_out(self.adapter, RUN, "bases are run without it"):
                _LOG.warning("not scored: %s: %s", self.adapter.info.name, sentence)
        self._text = load_tokenizer(self.base)
        self._prefix = harness.prefix_token(self.base, self._text, self.settings.prefix_token_id)
        stacked = stack_adapters([self.adapter or Adapter(modules={})], self.base)
        model = (model or load_model(self.base, self.settings.dtype)).with_adapter(stacked)
        self._models = Models(model, (self.base.name,))
        # The harness's other models end at the ends that the files state, and write on after a turn of a conversation.
        tokenizer = dataclasses.replace(self._text, stops=self._text.stated)
        self._generator = Generator.of(self.base, self.adapter, model=model, tokenizer=tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return harness.end_token(self.base, self._text)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self._prefix

    @property
    def max_gen_toks(self) -> int:
        """The most tokens of a generation, if a task does not say."""
        return Options().length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize a text; None adds bos if the tokenizer does and the text does not begin with it."""
        del kwargs
        bos = self._text.bos
        if add_special_tokens is None:
            add_special_tokens = bos is None or not string.startswith(self._text.backend.id_to_token(bos))
        return self._text.encode(string, special=add_special_tokens).ids.tolist()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score requests (context, continuation): log p(continuation), and whether it is the greedy one.

        Raises:
            UsageError: a continuation without tokens, or with more than the model reads.
            CheckpointError: the base gives values that are not finite.
            AdapterError: the base with the adapter does.
        """
        for context, continuation in (request.args for request in requests):
            if not continuation:
                raise UsageError(f"the continuation of {context[-60:]!r} is empty: give text to score")
        quiet = disable_tqdm or not self.settings.bars  # the harness has a bar of its own
        return super().loglikelihood(list(requests), disable_tqdm=quiet)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score requests (text,): log p(text) after the prefix token, in windows if the text is too long.

        Raises:
            CheckpointError: the base gives values that are not finite.
            AdapterError: the base with the adapter does.
        """
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        pairs = [pair for each in windows for pair in each]
        found = iter(self._judge(pairs, disable_tqdm))
        sums = [sum(next(found)[0] for _ in each) for each in windows]
        for text, value in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate text for requests (context, generation_kwargs), up to a stop string or stop token.

        Raises:
            UsageError: a setting that is not supported, or no room for a context.
        """
        keys = jax.random.key(self.settings.seed)
        prompts = [self._prompt(*request.args) for request in requests]
        texts = [""] * len(requests)
        with self._progress(disable_tqdm), track(len(requests), "write", "texts") as bar:
            for number, (options, members) in enumerate(harness.group_prompts(prompts, self.settings.batch_tokens)):
                rows = [prompts[index][0] for index in members]
                written = harness.generate(self._generator, rows, options, jax.random.fold_in(keys, number))
                for index, text in zip(members, written, strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update(len(members))
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> NoReturn:
        """Refuse chat templates."""
        del chat_history, add_generation_prompt
        msg = "chat templates are not supported by the model jcrosslora: run the task without apply_chat_template"
        raise UsageError(msg)

    def get_model_info(self) -> dict[str, str | None]:
        """Describe the model for the harness's results."""
        adapter = None if self.adapter is None else public_name(self.adapter.info.name)
        return {
            "base": public_name(self.base.name),
            "base_revision": self.base.revision,
            "adapter": adapter,
            "dtype": self.settings.dtype,
        }

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        found, scored = super()._encode_pair(context, continuation)
        # All spaces at the end of a context go to the continuation, so a context of spaces alone has no tokens.
        return found or [self._prefix], scored

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        pairs = [self._fitted(text[1], context, scored) for text, context, scored in requests]
        found = self._judge(pairs, disable_tqdm)
        for (text, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def _fitted(self, text: str, context: list[int], scored: list[int]) -> Pair:
        if not 1 <= len(scored) <= self.max_length:
            count = f"{len(scored)} tokens behind its context"
            raise UsageError(f"continuation {text[:60]!r}: has {count}, wanted 1 to {self.max_length}, the max_length")
        return context[-(self.max_length + 1 - len(scored)) :], scored

    def _judge(self, pairs: Sequence[Pair], quiet: bool) -> list[tuple[float, bool]]:
        with self._progress(quiet):
            found = harness.judge(self._models, pairs, self.settings.batch_tokens)
        harness.check_finite(found, self.base, self.adapter)
        return found

    def _progress(self, quiet: bool) -> AbstractContextManager[object]:
        return show_progress(not quiet) if self.settings.bars else nullcontext()

    def _windows(self, text: str) -> list[Pair]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        found = get_rolling_token_windows(tokens, self._prefix, max_seq_len=self.max_length, context_len=1)
        return [make_disjoint_window(pair) for pair in found]

    def _prompt(self, context: str, given: dict[str, Any]) -> tuple[list[int], Options]:
        options = harness.read_options(given)
        room = self.max_length - options.length
        if room < 1:
            msg = f"{options.length} tokens were asked for, but the model reads {self.max_length}: lower max_gen_toks"
            raise UsageError(msg)
        return (self.tok_encode(context) or [self._prefix])[-room:], options
