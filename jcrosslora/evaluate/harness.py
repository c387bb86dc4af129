r"""A base with an adapter as a model of lm-evaluation-harness, for all of its tasks.

Needs `pip install 'jcrosslora[eval]'`. From Python, on a task of your own that needs no network (`task.jsonl` has lines
{"question", "choices", "answer"}):

    import lm_eval
    from jcrosslora.evaluate.harness import JCrossLoRALM

    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "task.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    model = JCrossLoRALM(base="models/gemma-3-270m", adapter="moved")
    print(lm_eval.simple_evaluate(model=model, tasks=[task])["results"]["mine"])

This gives the same log-likelihoods as `jcrosslora.evaluate.score`. On the command line all options of `lm_eval` work;
`--include_path` names a folder of task files:

    python -m jcrosslora.evaluate.harness run --model jcrosslora --tasks arc_easy \
        --model_args base=models/gemma-3-270m,adapter=moved
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jcrosslora.adapter import Adapter, load_adapter
from jcrosslora.adapter.records import left_out
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.hub import cause_of, public_name, public_names, reaches_hub
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import Generator, Model, load_model, stack_adapters
from jcrosslora.decoder.model import RUN
from jcrosslora.errors import JCrossLoRAError, UsageError, not_finite, suggestion
from jcrosslora.evaluate.log_probs import Models, scored_tokens
from jcrosslora.evaluate.packing import Tokens
from jcrosslora.evaluate.probes import check_seed
from jcrosslora.utils.progress import show_progress, track
from jcrosslora.utils.settings import checked

try:
    from datasets import config as datasets_config
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    _MISSING = f"tasks of lm_eval need the lm_eval package ({error}): pip install 'jcrosslora[eval]'"
    if __name__ == "__main__":
        print(f"jcrosslora: {_MISSING}", file=sys.stderr)
        sys.exit(2)
    raise UsageError(_MISSING) from error

Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation, neither empty
_OFF = {"top_p": 1, "top_k": 0, "num_beams": 1}  # values that change nothing


class Generation(NamedTuple):
    """The sampling settings of a text."""

    until: tuple[str, ...] = ()  # the text ends before the first of these
    length: int = 256  # tokens at most, as in the harness's other models
    temperature: float = 0.0  # 0 takes the likeliest token


def read_generation(given: Mapping[str, Any]) -> Generation:
    """Read the `generation_kwargs` of a task.

    Raises:
        UsageError: a value out of range, or a setting that is not supported and would change the text.
    """
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        settings = dict(normalize_gen_kwargs(settings, Generation().length))
    except (TypeError, ValueError) as error:
        raise UsageError(f"generation settings {dict(given)}: {error}") from error
    until, length, sampled = (settings.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
    temperature = float(settings.pop("temperature", 0))
    if length < 1 or not 0 <= temperature < math.inf or (sampled and temperature == 0):
        msg = f"generation settings {dict(given)}: expected 1 token or more, and a temperature from 0 on, above 0 with "
        raise UsageError(msg + "do_sample")
    for name, value in settings.items():
        harmless = name in ("top_p", "top_k") and temperature == 0  # neither excludes the likeliest token
        if not harmless and value != _OFF.get(name):
            raise UsageError(f"generation setting {name} is {value!r}, which is not supported: leave it out")
    return Generation(tuple(filter(None, until)), length, temperature)


class JCrossLoRALM(TemplateLM):
    """A base, alone or with an adapter, run by the package's own decoder.

    Text is tokenized as by the harness's `hf` model: trailing spaces of a context belong to the continuation, whose
    tokens are those of the whole text after the context's. A context that is too long loses tokens at its start. One
    difference: a bos that the tokenizer prepends is not scored by `loglikelihood_rolling`. Changes of the embedding and
    of the output head are not applied, which is logged.

    `jcrosslora.show_progress` turns progress on. A request that is not supported raises a UsageError; values that are
    not finite raise a CheckpointError for the base alone, an AdapterError with an adapter.
    """

    @checked
    def __init__(
        self,
        base: str | Path | BaseModel,
        adapter: str | Path | Adapter | None = None,
        model: Model | None = None,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_tokens: int = 4096,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        **others: Any,
    ) -> None:
        """Load the weights.

        Args:
            base: a folder of safetensors, a GGUF file, a hub id, or an open base.
            adapter: of this base, applied unmerged: a folder, a hub id, or a loaded adapter; None for the base alone.
            model: the base, if it is loaded already (`jcrosslora.decoder.load_model`); then `dtype` is not used.
            batch_tokens: token positions in memory at once.
            max_length: maximum number of tokens that the model reads; None takes it from the configuration.
            prefix_token_id: token before a text without context; None takes bos, or eos if there is no bos.
            seed: of the sampling, in tasks with a temperature.
            others: batch_size, max_batch_size and device, which the harness passes and this model ignores.

        Raises:
            UsageError: an unknown setting, or a value out of range.
            CheckpointError: the base or its tokenizer cannot be read.
            AdapterError: the adapter cannot be read, or does not fit the base.
        """
        super().__init__()
        for name in others.keys() - {"batch_size", "max_batch_size", "device"}:
            raise UsageError(f"the model jcrosslora has no setting {name}: leave it out")
        check_seed(seed)
        self.base = open_base(base)
        used = Adapter(modules={}) if adapter is None else load_adapter(adapter, self.base)
        for sentence in left_out(used, RUN, "bases are run without it"):
            logging.getLogger(__name__).warning("not scored: %s: %s", used.info.name, sentence)
        config, self._text = self.base.config, load_tokenizer(self.base)
        self.max_length: int = (config.get("max_position_embeddings") or 0) if max_length is None else max_length
        if self.max_length < 1:
            raise UsageError(f"{self.base.ref}: max_length is {self.max_length}; expected a number from 1 on")
        eos = config.get("eos_token_id")
        ends = [*(eos if isinstance(eos, list) else [eos]), *self._text.stops]
        starts = [prefix_token_id, self._text.bos, config.get("bos_token_id"), *ends]
        self._prefix, self._end = (next((one for one in each if one is not None), -1) for each in (starts, ends))
        if not 0 <= self._prefix < (vocab := self.base.dims.vocab):
            raise UsageError(f"{self.base.ref}: prefix_token_id is {self._prefix}; expected 0 to {vocab - 1}")
        model = (model or load_model(self.base, dtype)).with_adapter(stack_adapters([used], self.base))
        self._models = Models(model, (self.base.name,))
        # Like the harness's other models, stop at the EOS tokens of the files, not at the end of a chat turn.
        tokenizer = dataclasses.replace(self._text, stops=self._text.stated)
        self._generator = Generator.of(self.base, None if adapter is None else used, model=model, tokenizer=tokenizer)
        self._dtype, self._batch_tokens, self._seed = dtype, batch_tokens, seed

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text: eos of the configuration, else the first stop token."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Refuse chat templates: the harness asks for this name if it is to apply one."""
        raise UsageError("the model jcrosslora does not support chat templates: run the task without one")

    def get_model_info(self) -> dict[str, str | None]:
        """Describe the model for the harness's results."""
        names = {"base": public_name(self.base.name), "adapter": public_name(self._generator.adapter_name)}
        return {**names, "base_revision": self.base.revision, "dtype": self._dtype}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenize a text; None adds bos if the tokenizer does and the text does not begin with it."""
        bos = self._text.bos
        if add_special_tokens is None:
            add_special_tokens = bos is None or not string.startswith(self._text.backend.id_to_token(bos))
        return self._text.encode(string, special=add_special_tokens).ids.tolist()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score requests (context, continuation): log p(continuation), and whether it is the greedy one."""
        del disable_tqdm  # a bar of the harness would run through our line
        return super().loglikelihood(list(requests), disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score requests (text,): log p(text) after the prefix token, in windows if the text is too long."""
        del disable_tqdm
        windows = [self._windows(request.args[0]) for request in requests]
        values = iter(self._judge([pair for each in windows for pair in each]))
        return [sum(next(values)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate text for requests (context, generation_kwargs), up to a stop string or stop token."""
        del disable_tqdm
        texts, ways = [""] * len(requests), [read_generation(request.args[1]) for request in requests]
        prompts = []
        for request, how in zip(requests, ways, strict=True):
            if (room := self.max_length - how.length) < 1:
                raise UsageError(f"max_gen_toks is {how.length}; expected less than the max_length, {self.max_length}")
            prompts.append((self.tok_encode(request.args[0]) or [self._prefix])[-room:])
        lengths = [len(prompt) + how.length for prompt, how in zip(prompts, ways, strict=True)]
        order = sorted(range(len(ways)), key=lambda index: -len(prompts[index]))
        batches = _batches({index: ways[index] for index in order}, lengths, self._batch_tokens)
        with track(len(requests), "write", "texts") as bar:
            for number, members in enumerate(batches):
                rows, (until, length, temperature) = [prompts[index] for index in members], ways[members[0]]
                # Powers of two, since every further shape has to be compiled.
                count, width = (1 << (size - 1).bit_length() for size in (len(rows), max(8, *map(len, rows))))
                sampling = length, temperature, jax.random.fold_in(jax.random.key(self._seed), number)
                written = self._generator.continue_tokens(rows, *sampling, shape=(count, width), until=until)
                for index, tokens in zip(members, written, strict=True):
                    text = self._text.decode(tokens)
                    ends = [place for stop in until if (place := text.find(stop)) >= 0]
                    texts[index] = text[: min(ends, default=len(text))]
                    self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                bar.update(len(members))
        return texts

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        found, scored = super()._encode_pair(context, continuation)
        # All spaces at the end of a context go to the continuation, so a context of spaces alone has no tokens.
        return found or [self._prefix], scored

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for (_context, text), context, scored in requests:
            if not 1 <= len(scored) <= self.max_length:
                count = f"{len(scored)} tokens; expected 1 to {self.max_length}, the max_length"
                raise UsageError(f"continuation {text[:60]!r}: has {count}")
            pairs.append((context[-(self.max_length + 1 - len(scored)) :], scored))
        return self._judge(pairs)

    def _windows(self, text: str) -> list[Pair]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        found = get_rolling_token_windows(tokens, self._prefix, max_seq_len=self.max_length, context_len=1)
        return [make_disjoint_window(pair) for pair in found]

    def _judge(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Score continuations as `loglikelihood` does; a shared context is run once."""
        # Each continuation has a copy of the context's KV cache.
        lengths = [len(context) + len(continuation) for context, continuation in pairs]
        contexts = {index: tuple(context) for index, (context, _) in enumerate(pairs)}
        groups = _batches(contexts, lengths, self._batch_tokens)
        items = []
        for group in groups:
            context = np.array(pairs[group[0]][0], np.int32)
            tails = tuple(np.array([context[-1], *pairs[index][1]], np.int32) for index in group)
            items.append(Tokens(context[:-1], tails, (1,) * len(group)))
        sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        with track(len(items), "score", "contexts") as bar:
            for found in scored_tokens(self._models, items, self._batch_tokens, bar):
                owners = np.array([groups[item][choice] for item, choice in found.places])
                np.add.at(sums, owners, found.log_probs[0].astype(np.float64))
                np.logical_and.at(greedy, owners, found.likeliest[0] == found.wanted)
        if not np.isfinite(sums).all():
            raise not_finite(self.base.name, self._generator.adapter_name, values="log-probabilities")
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))


register_model("jcrosslora")(JCrossLoRALM)


def _batches(keys: Mapping[int, Hashable], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group indices with equal keys into batches of at most `batch_tokens` positions, or of one index."""
    by_key: dict[Hashable, list[int]] = {}
    for index, key in keys.items():
        by_key.setdefault(key, []).append(index)
    batches = []
    for members in by_key.values():
        while members:
            count = max(1, batch_tokens // max(lengths[index] for index in members))
            batches.append(members[:count])
            members = members[count:]
    return batches


class Tasks:
    """Tasks of lm_eval, and the user's own from a folder of task files."""

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        """Find the tasks; a name may be a pattern such as arc_*.

        Raises:
            UsageError: a task is unknown, or `include_path` is not a folder.
        """
        if include_path is not None and not include_path.is_dir():
            raise UsageError(f"include-path {include_path}: expected the folder of your task files")
        log = logging.getLogger("lm_eval")
        if not log.isEnabledFor(logging.INFO):
            log.setLevel(logging.ERROR)  # it warns of defaults in its own task files
        self._manager = TaskManager(include_path=include_path, include_defaults=False)
        if not all(self._manager.match_tasks([name]) for name in names):
            with track(1, "list the tasks of lm_eval"):  # takes 10 s
                self._manager = TaskManager(include_path=include_path)
        self._names: list[str] = []
        for name in names:
            if not (found := self._manager.match_tasks([name])):
                msg = f"task {name!r} is unknown to lm_eval{suggestion(name, self._manager.all_tasks)}: `lm_eval ls "
                raise UsageError(msg + "tasks` lists all; give the folder of your own task files with --include-path")
            self._names += [one for one in found if one not in self._names]

    def judge(self, base: BaseModel, adapters: Sequence[Adapter], **settings: Any) -> list[dict[str, Any]]:
        """Run all tasks on the base and on the base with each adapter, and return their figures as JSON data.

        `settings` go to `lm_eval.simple_evaluate`, such as limit and num_fewshot.

        Raises:
            UsageError: the data of a task cannot be loaded.
        """
        advice = "see that its file and its data are there and right"
        if not reaches_hub():
            advice = "its data is not in the cache, and the hub cannot be reached: check the network"
            datasets_config.HF_HUB_OFFLINE = True  # else each file would be tried for 20 s
        for name in self._names:  # before any weights are read
            try:
                self._manager.load([name])
            except Exception as error:  # of lm_eval, of datasets, or of the code of a task
                raise UsageError(f"task {name!r} cannot be loaded ({cause_of(error)}): {advice}") from error
        settings |= {"tasks": self._names, "task_manager": self._manager, "log_samples": False}
        weights, found = load_model(base), []
        with track(1 + len(adapters), "evaluate", "models") as bar:
            for adapter in (None, *adapters):
                found.append(simple_evaluate(JCrossLoRALM(base, adapter, weights), **settings))
                bar.update()
        return list(_figures(found, public_names([base.name, *(adapter.info.name for adapter in adapters)])))


def _figures(found: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the figures of all models by task; for a group of tasks, examples and shots may be None."""
    for task, metrics in found[0]["results"].items():
        examples = found[0].get("n-samples", {}).get(task, {}).get("effective")
        about = {"examples": examples, "shots": found[0].get("n-shot", {}).get(task)}
        for key, value in metrics.items():
            name, _, kind = key.partition(",")  # "acc,none", where none is the filter of the answers
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            models = []
            for model, results in zip(names, (one["results"][task] for one in found), strict=True):
                stderr = results.get(f"{name}_stderr,{kind}")  # "N/A" if the metric has none
                stderr = float(stderr) if isinstance(stderr, int | float) else None
                models.append({"name": model, "value": float(results[key]), "stderr": stderr})
            yield {"task": task, "metric": name if kind == "none" else key, **about, "models": models}


def main() -> None:
    """Run the command line of `lm_eval` with the model "jcrosslora"; exit with 2 on a `JCrossLoRAError`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        with show_progress():
            cli_evaluate()
    except JCrossLoRAError as error:
        print(f"jcrosslora: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
