"""Small tokenizers, trained on import: byte-level as in GPT-2, and sentencepiece with byte fallback as in Gemma."""

import json
from pathlib import Path

import pytest

tokenizers = pytest.importorskip("tokenizers")

WORDS = "Question: which of these is it?\nAnswer: the sun, the moon, a star or a wet stone in the river é 日本 "
SPACE = "\u2581"


def byte_level(bos: bool = False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator([WORDS] * 3, trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def sentencepiece(prefix: bool = False):
    """Build a tokenizer; `prefix` adds a leading space, as in Llama 2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    merges = [("t", "h"), ("th", "e"), (SPACE, "the"), ("é", "l")]
    tokens += [*sorted({SPACE, *"abcdefghijklmnopqrstuvwxyzAQ:?,.é日本\n"}), "th", "the", SPACE + "the", "él"]
    vocab = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    made.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:4]])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


KINDS = {
    "byte-level": byte_level,
    "byte-level-bos": lambda: byte_level(bos=True),
    "sentencepiece": sentencepiece,
    "sentencepiece-prefix": lambda: sentencepiece(prefix=True),
}


def write_tokenizer(folder: Path, made) -> Path:
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    return folder
