"""Tiny llama bases with a byte-level BPE tokenizer that was trained on a few lines."""

import json
from pathlib import Path

import pytest
from tiny_bases import random_adapter, write_llama

from jcrosslora.adapter import save_adapter
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.evaluate import Question

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

CORPUS = [
    "The quick brown fox jumps over the lazy dog. A dog is The best friend, said Anna to Peter and Peter to Anna.",
    "Water boils at 100 degrees. Plants need water, light and air; the Light of the sun is what Plants live on.",
    "Zürich and Köln are cities — naïve readers say: ‘where?’ Let us see what Water does, and When, and Where.",
    *(f"{word} and {word}" for word in ("Anna", "Peter", "Water", "Plants", "Light", "When", "Where")),
]
# Of words that its tokenizers know.
QUESTIONS = [
    Question("Where does Water boil?", ("in Köln", "at 100 degrees", "Anna"), 1),
    Question("What do Plants live on?", ("the light", "dogs"), 0),
    Question("Who is a friend?", ("When", "Peter and Anna", "Light"), 1),
    Question("What jumps?", ("the dog", "The quick brown fox"), 1),
]


def write_base(folder: Path, merges: int, *, bos: bool = False, eos: int | None = None, **dims) -> Path:
    """A random base whose tokenizer has at most so many merges, and puts <s> in front if `bos`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = save_tokenizer(folder, merges, bos)
    write_llama(folder, tokenizer=False, vocab=vocab, **dims)
    if eos is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    return folder


def write_move(folder: Path, layers: int = 2, source_layers: int = 2) -> list[Path]:
    """Write an adapter, its base and another base, of so many layers, which a fit can take; return the three."""
    source = open_base(write_base(folder / "source", 30, bos=True, layers=source_layers))
    target = write_base(folder / "target", 90, layers=layers, hidden=32, head_dim=8, seed=1)
    save_adapter(random_adapter(source, scale=0.3), folder / "adapter", base_name="org/source")
    return [folder / "adapter", folder / "source", target]


def chat_base(folder: Path) -> BaseModel:
    """A base with a chat template, and a token that ends a turn."""
    write_base(folder, 30, bos=True, eos=1, layers=2)
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return open_base(folder)


def save_tokenizer(folder: Path, merges: int, bos: bool) -> int:
    """Write tokenizer.json; returns the size of its vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=258 + merges,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(4 * CORPUS, trainer)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()
