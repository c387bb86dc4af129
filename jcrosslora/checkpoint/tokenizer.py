"""The tokenizer of a base: text to token ids, with the character at which each token ends."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.store import read_json_object
from jcrosslora.checkpoint.tokenizer_gguf import bos_of, build_backend, eos_of, read_metadata
from jcrosslora.errors import CheckpointError, UsageError
from jcrosslora.utils.digests import sha256
from jcrosslora.utils.files import read_small

T = TypeVar("T")

# Version of the rules for reading tokenizers: raise it whenever the same files give other tokens or ends.
_RULES = b"2"
# Tokens that end a turn or a document in the supported families, in addition to the tokenizer's eos.
_TURN_ENDS = (
    *("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"),
    *("<|endoftext|>", "<|end_of_text|>"),
)
# In the format of gpt-oss <|end|> closes each message, also the reasoning; these two end a turn.
_HARMONY_ENDS = ("<|return|>", "<|call|>")
# Files of a tokenizer, and what transformers reads along with tokenizer.json.
_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "generation_config.json"),
)
_BESIDE = ("config.json", *_FILES)
# Cached, because reading a tokenizer of 262,144 tokens takes seconds.
_READ: WeakKeyDictionary[BaseModel, "Tokenizer"] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tokenized text of T tokens.

    Attributes:
        ids: int32 (T,), the tokens.
        ends: int32 (T,), number of characters (code points) of the text up to the end of each token; 0 for bos; -1 for
            a token that ends inside a character or covers no text.
    """

    ids: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A base's tokenizer.

    Attributes:
        bos: id that the model's own tokenizer puts before a text, None if it puts none.
        stops: ids of the tokens that end a text: the stated ones, and known end-of-turn tokens.
        vocab: rows of the base's embedding, above every id.
        ref: names the base in errors.
        backend: a `tokenizers.Tokenizer` without post-processor, truncation and padding.
        stated: the ids of `stops` that the base's files state.
        eos: id of the EOS token, None if there is none.
        bos_name: the name of the BOS token, which a chat template may use; "" if there is none.
        chat_template: source of the Jinja template that renders conversations, None if the base has none.
    """

    bos: int | None
    stops: tuple[int, ...]
    vocab: int
    ref: str
    backend: Any = field(repr=False)
    stated: tuple[int, ...] = ()
    eos: int | None = None
    bos_name: str = ""
    chat_template: str | None = field(default=None, repr=False)

    @property
    def eos_name(self) -> str:
        """The name of the EOS token, "" if there is none."""
        return "" if self.eos is None else self.backend.id_to_token(self.eos) or ""

    def encode(self, text: str, *, special: bool = True) -> Encoded:
        """Split a text into tokens. The names of special tokens in the text become these tokens.

        `special` puts bos in front if the model's own tokenizer does so.

        Raises:
            UsageError: the text has half a surrogate pair, which no tokenizer accepts.
            CheckpointError: the base has no embedding for a token.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            msg = f"text has half a surrogate pair at character {error.start}: give text that UTF-8 can hold"
            raise UsageError(msg) from None
        found = _called(self.ref, lambda: self.backend.encode(text, add_special_tokens=False))
        ids, ends = np.array(found.ids, np.int64), _ends(found.offsets)
        if special and self.bos is not None:
            ids, ends = np.insert(ids, 0, self.bos), np.insert(ends, 0, 0)
        if ids.size and ids.max() >= self.vocab:
            msg = f"{self.ref}: its tokenizer gives token {ids.max()}, but its embedding has {self.vocab} rows"
            raise CheckpointError(msg)
        return Encoded(ids.astype(np.int32), ends)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Join tokens into text, without special tokens."""
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=True)


def pad_right(rows: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pad at most B rows of at most T tokens, int32, on the right into one array of `shape` (B, T).

    Returns:
        int32 (B, T) tokens, zero in the padding, and bool (B, T), False in the padding.
    """
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return tokens, mask


def load_tokenizer(base: BaseModel) -> Tokenizer:
    """Load the tokenizer of a base from tokenizer.json or its GGUF metadata; an opened base caches it.

    Raises CheckpointError if there is none, or it cannot be read.
    """
    if base in _READ:
        return _READ[base]
    path = base.tokenizer_path
    if path is None:
        msg = f"{base.ref}: no tokenizer was given, and text is to be read: give one with open_base(weights, "
        raise CheckpointError(msg + "config=config, tokenizer=...), as a folder with tokenizer.json or as an object")
    found = read_tokenizer(path, base.ref, base.dims.vocab, base.config.get("eos_token_id"), base.chat_template)
    return _READ.setdefault(base, found)


def read_tokenizer(
    path: Path, ref: str, vocab: int | None = None, eos: Any = None, chat_template: str | None = None
) -> Tokenizer:
    """Read the tokenizer of a folder with tokenizer.json, or of a GGUF file.

    Args:
        vocab: rows of the base's embedding; None takes the tokenizer's number of tokens.
        eos: the EOS id or list of ids in the configuration.
        chat_template: Jinja source instead of the tokenizer's own.

    Raises CheckpointError if it cannot be read.
    """
    backend, bos, ends, bos_name, own_template = _from_gguf(path) if path.is_file() else _from_folder(path)
    backend.no_truncation()
    backend.no_padding()
    # A post-processor adds bos, and may also trim spaces off the offsets.
    backend.post_processor = None
    rows: int = backend.get_vocab_size() if vocab is None else vocab
    named = [backend.token_to_id(token) for token in _TURN_ENDS]
    harmony = [backend.token_to_id(token) for token in _HARMONY_ENDS]
    if None not in harmony:
        named = [index for index in named if index != backend.token_to_id("<|end|>")] + harmony
    configured = eos if isinstance(eos, list) else [eos]
    stated, known = (
        [index for index in found if type(index) is int and 0 <= index < rows]
        for found in ([*ends, *configured], [*ends, *named, *configured])
    )
    return Tokenizer(
        bos,
        stops=tuple(sorted(set(known))),
        stated=tuple(sorted(set(stated))),
        vocab=rows,
        ref=ref,
        backend=backend,
        eos=next(iter(known), None),
        bos_name=bos_name,
        chat_template=own_template if chat_template is None else chat_template,
    )


def _ends(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    starts, ends = np.array(offsets, np.int32).reshape(-1, 2).T
    # Tokens that share a character all have its whole range; the last of them ends it.
    unfinished = np.append(starts[1:] < ends[:-1], False)[: len(ends)]
    return np.where(unfinished | (starts == ends), np.int32(-1), ends)


def _first_special(backend: Any) -> int | None:
    with_special, without = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
    return with_special[0] if with_special[: len(without)] != without else None


def _from_folder(folder: Path) -> tuple[Any, int | None, list[Any], str, str | None]:
    path = folder / "tokenizer.json"
    if not path.exists():
        msg = f"{folder} has no tokenizer.json, expected to tokenize text: copy the model's own into the folder"
        raise CheckpointError(msg)
    read_json_object(path)
    for beside in (beside for name in _BESIDE for beside in folder.glob(name)):
        _called(beside, lambda beside=beside: read_small(beside))  # so that no pipe is waited for
    from transformers import PreTrainedTokenizerFast

    own = _called(path, lambda: PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True))
    backend = own.backend_tokenizer
    bos = _called(path, lambda: _first_special(backend))
    template = own.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    ends = [own.eos_token_id, *_stated_ends(folder)]
    return backend, bos, ends, own.bos_token or "", template if isinstance(template, str) else None


def _stated_ends(folder: Path) -> list[Any]:
    """List the EOS ids stated in the files next to a tokenizer; a damaged file is skipped."""
    found: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        with suppress(CheckpointError):  # transformers loads a model without the first; the second was read already
            stated = read_json_object(folder / name).get("eos_token_id")
            found += stated if isinstance(stated, list) else [stated]
    return found


def _from_gguf(path: Path) -> tuple[Any, int | None, list[Any], str, str | None]:
    metadata = read_metadata(path)
    backend = _called(path, lambda: build_backend(metadata, path))
    begin, template = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.chat_template")
    bos_name = backend.id_to_token(begin) if type(begin) is int and begin >= 0 else None
    return backend, bos_of(metadata), eos_of(metadata), bos_name or "", template if isinstance(template, str) else None


def _called(ref: str | Path, call: Callable[[], T]) -> T:
    """Call the tokenizers library and blame the tokenizer for any error."""
    try:
        return call()
    except CheckpointError:
        raise
    # The compiled part of the library raises plain `Exception` for invalid input; its panics are a "PanicException",
    # which is no `Exception` and whose class cannot be imported.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        msg = f"{ref}: the tokenizer cannot be read ({cause}): expected one that the transformers library loads"
        raise CheckpointError(msg) from error


def tokenizer_parts(base: BaseModel) -> Iterator[bytes]:
    """Yield everything that tokens depend on: the rules here, the given template, and the tokenizer's files."""
    yield _RULES
    if base.chat_template is not None:
        yield from (b"given template", base.chat_template.encode())
    if (folder := base.tokenizer_path) is None:
        return
    for pattern in ("tokenizer.json", *_FILES):  # the key of the weights has the configuration
        for path in sorted(folder.glob(pattern)):
            # If a file cannot be read, reading the tokenizer raises the error.
            with suppress(OSError):
                yield from (path.name.encode(), read_small(path))


def tokenizer_key(base: BaseModel) -> str:
    """Return the cache key of a base's tokenizer and chat template, except for parts in the weights' file."""
    return sha256(*tokenizer_parts(base))
