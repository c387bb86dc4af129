"""Let a base write probe texts, each from one word of its vocabulary, and keep them in the disk cache.

The cache key contains everything that a text depends on; without a writable folder the cache is off. The folder
`probes` in the user's cache (see `jcrosslora.utils.cache.cache_root`) may be removed at any time. Processes may share
it: files are written atomically, and a damaged file counts as missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import tokenizer_parts
from jcrosslora.decoder import Generator, Model, fast_dtype
from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.errors import CheckpointError, MethodError, UsageError
from jcrosslora.evaluate.probe_batches import ProbeBatch as ProbeBatch
from jcrosslora.evaluate.probe_batches import count_positions as count_positions
from jcrosslora.evaluate.probe_batches import match_positions as match_positions
from jcrosslora.evaluate.probe_batches import probe_batches as probe_batches
from jcrosslora.text import Completion, Prompt
from jcrosslora.text.completion import prompt_text
from jcrosslora.utils.cache import cache_root
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.digests import sha256
from jcrosslora.utils.files import write_whole
from jcrosslora.utils.progress import track

COUNT, PROBE_TOKENS = 288, 96  # texts, and maximum tokens of a text
TEXTS = "probes"  # the folder, below the cache's root
# Version of `write_texts` and `start_words`: raise it whenever its texts change.
PROCEDURE = 2
_MOST, _LONGEST = 100_000, 200_000  # given texts (a fit uses 1,000), and characters of one (50,000 tokens)
_TRIES = 4
_SHORTEST = 8  # tokens; an instruction-tuned model sometimes stops right after the first word


@dataclass(frozen=True)
class Probes:
    """Texts that both bases are run on.

    Attributes:
        description: their origin, for reports, e.g. "written by HuggingFaceTB/SmolLM2-135M at temperature 1".
        seed: seed of generated or sampled texts; None for given texts.
        positions: number of matched positions of the two bases (see `count_positions`); None before it is known.
        path: file that given texts were read from; None for other texts.
        prompts: the prompts or conversations that given texts were made from; empty for other texts.
        examples: the user's prompts with right answers; without other prompts, the texts are those of the examples.
        examples_path: the file that they were read from.
    """

    texts: tuple[str, ...]
    description: str
    seed: int | None = None
    positions: int | None = None
    path: str | None = None
    prompts: tuple[Prompt, ...] = ()
    examples: tuple[Completion, ...] = ()
    examples_path: str | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for too many or too long texts to process in reasonable time."""
        longest = max([*map(len, self.texts), *(len(prompt_text(one.prompt)) for one in self.examples)], default=0)
        for what, value, most in (("prompts", len(self.texts), _MOST), ("characters in a prompt", longest, _LONGEST)):
            if value > most:
                msg = f"{self.path or 'prompts'}: {value:,} {what}, expected at most {most:,}; give a part of them"
                raise UsageError(msg)

    @classmethod
    def given(cls, prompts: Sequence[Prompt], description: str, path: str | None = None) -> Probes:
        """Make the record of texts or conversations that a user gave."""
        texts = tuple(prompt_text(prompt) for prompt in prompts)
        return cls(texts, description, path=path, prompts=tuple(prompts))

    def describe(self) -> str:
        """Describe the texts in a line for reports: count, source, seed, matched positions and digest."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        positions = "" if self.positions is None else f", {self.positions} matched positions"
        more = f", {len(self.examples)} examples" if self.examples else ""
        return f"{len(self.texts)} texts {self.description}{seed}{positions}{more}, sha256 {self.digest()[:12]}"

    def digest(self) -> str:
        """Return the SHA-256 (hex) of texts, or messages with their roles, and examples; a zero byte ends each."""
        labelled = (part for one in self.examples for part in (_digested(one.prompt), one.answer))
        joined = "".join(f"{text}\0" for text in (*(map(_digested, self.prompts or self.texts)), *labelled))
        return hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()


def _digested(prompt: Prompt) -> str:
    """Return a text, or the messages of a conversation as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps([(one.role, one.content) for one in prompt])


@dataclass(frozen=True)
class TextSettings:
    """Settings of the texts that a base writes.

    Attributes:
        length: maximum number of tokens after the first word; a text ends earlier if the model stops.
        temperature: of the sampling; 0 is greedy.
        seed: for the words and the sampling; the same base, settings and seed give the same texts on one kind of
            machine.

    Raises:
        UsageError: count or length below 1, a temperature that is negative or not finite, or a seed outside 0 to
            2^32 - 1.
    """

    count: int
    length: int = PROBE_TOKENS
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.count, self.length) < 1:
            raise UsageError(f"{self.count} texts of {self.length} tokens were asked for: each must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            msg = f"temperature {self.temperature} was asked for, expected a finite number from 0 on, such as 1"
            raise UsageError(msg)
        check_seed(self.seed)


def written_probes(
    base: BaseModel,
    count: int = COUNT,
    *,
    length: int = PROBE_TOKENS,
    temperature: float = 1.0,
    seed: int = 0,
    adapter: Adapter | None = None,
) -> Probes:
    """Let a base write probe texts; arguments and errors are those of `TextSettings` and `write_texts`.

    Texts of the same base, adapter and settings are read from the disk cache (see this module;
    the environment variable JCROSSLORA_CACHE moves the folder).
    """
    settings = TextSettings(count, length, temperature, seed)
    key = texts_key(base, settings, adapter)
    texts = find_texts(key)
    if texts is None:
        texts = write_texts(base, settings, adapter)
        keep_texts(key, texts)
    writer = base.name if adapter is None else f"{base.name} with an adapter"
    return Probes(tuple(texts), f"written by {writer} at temperature {temperature:g}", seed)


def write_texts(
    base: BaseModel,
    settings: TextSettings,
    adapter: Adapter | None = None,
    *,
    batch: int = 48,
    model: Model | None = None,
) -> list[str]:
    """Let a base write texts, each starting from a capitalised word of its vocabulary (see `start_words`).

    Texts with fewer than 8 tokens after the word (fewer than the length, if that is smaller), texts that repeat a
    single token, and duplicates are dropped and replaced. At most 4 times as many texts are tried, in whole batches.

    Args:
        base: the model; it needs a tokenizer.
        settings: how many texts, and how they are sampled.
        adapter: applied to the base; None for the base alone.
        batch: maximum batch size; on a CPU batches of 32 take two thirds of the time of batches of 16.
        model: the base if it is loaded already; None loads it in `fast_dtype()`.

    Raises:
        UsageError: a batch below 1.
        MethodError: too few of the generated texts were usable.
        AdapterError: the adapter does not fit the base, or the base's predictions with it are not finite.
        CheckpointError: the tokenizer or the weights cannot be read, or the predictions are not finite.
    """
    if batch < 1:
        raise UsageError(f"texts in batches of {batch} were asked for: expected 1 or more")
    count, length, temperature = settings.count, settings.length, settings.temperature
    generator = Generator.of(base, adapter, model=model)
    bos = [] if generator.tokenizer.bos is None else [generator.tokenizer.bos]
    rows, rounds = _plan(count, batch)
    words = start_words(_vocabulary(base), rounds * rows, settings.seed).reshape(rounds, rows)
    keys = jax.random.key(settings.seed)
    texts: list[str] = []
    with track(count, "write", "texts") as bar:
        for number in range(rounds):
            prompts = [[*bos, word] for word in words[number]]
            written = generator.continue_tokens(prompts, length, temperature, jax.random.fold_in(keys, number))
            found = _usable(generator, words[number], written, length)
            texts = list(dict.fromkeys(texts + found))
            bar.update(min(len(texts), count) - bar.done)
            if len(texts) >= count:
                return texts[:count]
    tried = f"only {len(texts)} of {words.size} texts that it wrote at temperature {temperature:g} could be used"
    raise MethodError(f"{base.ref}: {tried}, expected {count}: change the temperature, or give texts of your own")


def probes_cost(count: int) -> Cost:
    """Count the writing of probe texts with the usual settings."""
    return writing_cost(count, PROBE_TOKENS, prompt=1)


def _plan(count: int, batch: int) -> tuple[int, int]:
    """Choose the batch size and the maximum number of batches; spare texts replace the few that are dropped."""
    wanted = count + count // 16 + 1
    rows = -(-wanted // -(-wanted // batch))
    return rows, -(-_TRIES * count // rows)


def _vocabulary(base: BaseModel) -> dict[bytes, int]:
    """Return the normal tokens of a base as bytes, with their ids."""
    vocabulary = base.vocabulary()
    if vocabulary.tokens is None:
        msg = f"{base.ref}: its vocabulary cannot be read ({vocabulary.reason}): add its tokenizer.json"
        raise CheckpointError(msg)
    return dict(vocabulary.tokens)


def _usable(generator: Generator, words: np.ndarray, written: Sequence[np.ndarray], length: int) -> list[str]:
    """Decode the continuation of each word, and drop texts that are too short or repeat a single token."""
    texts = []
    for word, tokens in zip(words, written, strict=True):
        text = generator.decode([word, *tokens])
        if len(tokens) >= min(_SHORTEST, length) and len({int(word), *tokens.tolist()}) > 1 and text.strip():
            texts.append(text)
    return texts


def start_words(tokens: Mapping[bytes, int], count: int, seed: int) -> np.ndarray:
    """Draw token ids of capitalised whole words.

    A token counts as a whole word if it is a capital followed by small letters, and the vocabulary also has it with a
    space in front: pieces of words, such as "Th", mostly lack that form. If there are no such tokens (a script without
    capitals), tokens of letters are drawn, and if there are none of these either, any normal tokens.

    `tokens` maps the bytes of a token to its id, and is not empty. No word is repeated before all have been used.

    Returns:
        int32 (count,). A larger count continues the list of a smaller one.
    """
    ids = np.asarray(_candidates(tokens), np.int32)
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(ids) for _ in range(-(-count // len(ids)))]
    return np.concatenate(rounds)[:count]


def check_seed(seed: int) -> None:
    """Check that a seed fits the random generators of numpy and JAX.

    Raises:
        UsageError: it is not from 0 to 2^32 - 1.
    """
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"seed {seed} was asked for, expected 0 to {(1 << 32) - 1}")


def _candidates(tokens: Mapping[bytes, int]) -> list[int]:
    words = {token: index for token, index in tokens.items() if _text(token).isalpha()}
    whole = [index for token, index in words.items() if _is_capitalised(_text(token)) and b" " + token in tokens]
    return sorted(whole or words.values() or tokens.values())


def _is_capitalised(word: str) -> bool:
    # "A" and "I" are words, but hardly any other single letters are.
    return len(word) > 1 and word[0].isupper() and word[1:].islower()


def _text(token: bytes) -> str:
    return token.decode("utf-8", errors="replace")  # U+FFFD is no letter


def texts_key(base: BaseModel, settings: TextSettings, adapter: Adapter | None) -> str:
    """Hash everything that the texts of `write_texts` depend on (SHA-256, hex); reads the weight files once.

    These are the base's weights, configuration and tokenizer, the adapter's factors, the settings, the version of the
    procedure, JAX's platform and its fast dtype: sampling repeats exactly on one kind of machine only.
    """
    chosen = [settings.count, settings.length, float(settings.temperature), settings.seed]
    # `default` handles numpy scalars and any other values in a configuration.
    parts = [PROCEDURE, jax.default_backend(), fast_dtype().name, base.digest(), dict(base.config), chosen]
    stated = json.dumps(parts, sort_keys=True, default=str)
    return sha256(stated.encode(), *tokenizer_parts(base), *_adapter_parts(adapter))


def find_texts(key: str) -> list[str] | None:
    """Return the texts of a key, or None if the file is missing, unreadable or damaged."""
    path = _path(key)
    if path is None:
        return None
    try:
        record = json.loads(path.read_bytes())
        texts = record["texts"]
        whole = record["key"] == key and record["sha256"] == _checksum(texts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return texts if whole else None


def keep_texts(key: str, texts: list[str]) -> None:
    """Store texts under a key; do nothing if the folder is not writable or the disk is full."""
    path = _path(key)
    if path is None:
        return
    content = json.dumps({"key": key, "sha256": _checksum(texts), "texts": texts}, indent=0)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode())


def _path(key: str) -> Path | None:  # None for a user without a home folder
    root = cache_root()
    return None if root is None else root / TEXTS / f"{key}.json"


def _checksum(texts: object) -> str:
    return sha256(json.dumps(texts).encode())


def _adapter_parts(adapter: Adapter | None) -> Iterator[bytes]:
    if adapter is None:
        return
    for name, factors in sorted(adapter.modules.items()):
        yield f"{name} {factors.scale!r}".encode()
        for side in (factors.a, factors.b):
            array = np.asarray(side)
            yield f"{array.dtype} {array.shape}".encode()
            yield array.tobytes()
