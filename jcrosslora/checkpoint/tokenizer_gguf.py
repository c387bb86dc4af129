"""Build the tokenizer of a GGUF file with the tokenizers library.

transformers can build one too, but needs torch for it, takes four times as long for Gemma, and ignores
`tokenizer.ggml.pre`, the rule by which text is split before the merges.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jcrosslora.checkpoint.gguf import open_header
from jcrosslora.checkpoint.vocabulary import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from jcrosslora.errors import CheckpointError

_SPACE = "\u2581"

# Rules that split text before the merges, from the tokenizer.json of the models; `tokenizer.ggml.pre` names them.
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
_SPLITS = {
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _TAIL,
    "qwen2": _WORDS + r"\p{N}" + _TAIL,
    "tekken": _CASED + r"\p{N}" + _TAIL.replace(r"[\r\n]*", r"[\r\n/]*"),
}
_BY_GPT2 = ("default", "gpt-2", "smollm")
_OTHERS = ("llama", "qwen2", "qwen3")  # architectures whose models have other rules than GPT-2's
_TEXT_ENDS = ("<unk>", "<s>", "<|endoftext|>")


def read_metadata(path: Path) -> Mapping[str, Any]:
    """Read the metadata of a GGUF file."""
    return open_header(path)[2].metadata


def build_backend(metadata: Mapping[str, Any], path: Path) -> Any:
    """Build a `tokenizers.Tokenizer` without post-processor.

    Raises CheckpointError for a kind of tokenizer that is not supported, or invalid metadata.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama", "gemma4"):
        msg = f"{path}: its tokenizer is of kind {model!r}, expected gpt2, llama or gemma4: use the model's folder "
        raise CheckpointError(msg + "instead")
    tokens, types = (_listed(metadata, key, str if key == "tokens" else int, path) for key in ("tokens", "token_type"))
    if len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        counts = f"{len(tokens)} tokens, {len(set(tokens))} different, with {len(types)} types"
        raise CheckpointError(f"{path}: has {counts}: convert it again")
    backend = _byte_level(metadata, tokens, path) if model == "gpt2" else _sentencepiece(metadata, tokens, types, path)
    # Phi-3's markers absorb the space after them, which the file does not state.
    _add_tokens(backend, tokens, types, strip=model == "llama" and metadata.get("general.architecture") == "phi3")
    return backend


def bos_of(metadata: Mapping[str, Any]) -> int | None:
    """Return the BOS token id, None if no text gets one; llama.cpp's rule applies if the metadata do not say."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    implied = model in ("llama", "gemma4") or pre in ("llama-bpe", "tekken")
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    return bos if metadata.get("tokenizer.ggml.add_bos_token", implied) is True and type(bos) is int else None


def eos_of(metadata: Mapping[str, Any]) -> list[Any]:
    """Return the tokens that end a document, a turn and a message, None for each that the metadata do not state."""
    return [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]


def _listed(metadata: Mapping[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} is no list of {kind.__name__}: convert the model again")
    return values


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], path: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if "tokenizer.ggml.pre" not in metadata and str(metadata.get("general.architecture")).startswith(_OTHERS):
        msg = f"{path}: does not state how text is split (tokenizer.ggml.pre), as files of before May 2024: convert "
        raise CheckpointError(msg + "the model again, or use its folder instead")
    if pre not in (*_SPLITS, *_BY_GPT2):
        msg = f"{path}: splits text by the rule {pre!r}, which is not supported: use the model's folder instead"
        raise CheckpointError(msg)
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = _listed_merges(metadata, vocab, path)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in ("llama-bpe", "tekken")))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in _BY_GPT2)]
    if pre in _SPLITS:
        steps.insert(0, pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated"))
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _listed_merges(metadata: Mapping[str, Any], vocab: Mapping[str, int], path: Path) -> list[tuple[str, str]]:
    """Return the merges that the metadata list, and refuse one that is not two tokens that make a third."""
    pairs = [tuple(merge.split(" ")) for merge in _listed(metadata, "merges", str, path)]
    if not all(len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys() for pair in pairs):
        msg = f"{path}: a merge in tokenizer.ggml.merges is not two tokens that make a third: convert the model again"
        raise CheckpointError(msg)
    return [(pair[0], pair[1]) for pair in pairs]


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], path: Path) -> Any:
    """Build a tokenizer that writes spaces as U+2581, with merges by score, or for Gemma 4 by the list of them."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    listed = metadata.get("tokenizer.ggml.model") == "gemma4"
    vocab = {token: index for index, token in enumerate(tokens)}
    # llama.cpp reads no scores if there are merges.
    scores = [0.0] * len(tokens) if listed else _listed(metadata, "scores", float, path)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if len(scores) != len(tokens) or type(unknown) is not int or not 0 <= unknown < len(tokens):
        counts = f"{len(scores)} scores for {len(tokens)} tokens, and {unknown!r} as the unknown one"
        raise CheckpointError(f"{path}: has {counts}: convert the model again")
    normal = {token: score for token, kind, score in zip(tokens, types, scores, strict=True) if kind == NORMAL}
    # The longest run of line ends that is a token, with all shorter ones.
    lines = next(count for count in range(len(vocab) + 1) if "\n" * (count + 1) not in vocab) if listed else 0
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[*_listed_merges(metadata, vocab, path), *_line_merges(lines)] if listed else _merges(normal),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if lines:
        # Merges never reach from a line to the next. A run of line ends is one token if there is such a token.
        runs = rf"(?<!\n)\n{{1,{lines}}}(?!\n)|\n"
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(runs), "isolated")
    prefixed = not listed and metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefixed else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return backend


def _line_merges(most: int) -> list[tuple[str, str]]:
    """List the merges that make one token of any run of at most this many line ends; files have none of them."""
    return [("\n" * first, "\n" * (count - first)) for count in range(2, most + 1) for first in range(1, count)]


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """List merges equivalent to sentencepiece: all pairs of neighbours that form a token, best score first."""
    ordered = sorted((token for token in scores if len(token) > 1), key=lambda token: -scores[token])
    return [
        (token[:cut], token[cut:])
        for token in ordered
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]


def _add_tokens(backend: Any, tokens: list[str], types: list[int], *, strip: bool) -> None:
    """Match control and user-defined tokens in text as they are written, before the merges.

    With `strip` they take space behind them along, except for those that begin or end a text.
    """
    from tokenizers import AddedToken

    for kinds, special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
        added = [
            AddedToken(token, normalized=False, special=special, rstrip=strip and token not in _TEXT_ENDS)
            for token, kind in zip(tokens, types, strict=True)
            if kind in kinds and token
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
