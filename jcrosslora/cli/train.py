"""The command `train`: train a LoRA adapter on examples."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tyro
from rich.console import Console

from jcrosslora.checkpoint.hub import public_name
from jcrosslora.cli.output import say
from jcrosslora.errors import UsageError
from jcrosslora.training.checkpoints import TrainingSettings
from jcrosslora.utils.logs import LogName, find_log, log_to


@dataclass(frozen=True, kw_only=True)
class Train(TrainingSettings):
    """Train a LoRA adapter of a base model on the answers of examples, and write it as a PEFT folder."""

    base: tyro.conf.Positional[str]
    """The base model: a folder of safetensors, a GGUF file or a hub id."""
    data: Path
    """JSONL with {"messages"}, {"prompt", "answer"} or {"question", "choices", "answer": index} on each line."""
    out: Path
    """The folder to write."""
    template: Path | None = None
    """File with a chat template, by which conversations are read in place of the base's own."""
    limit: int | None = None
    """Only the first so many examples."""
    checkpoints: Path | None = None
    """Folder for the states of the run: the same command continues from the newest."""
    log: LogName | None = None
    """Show the loss as it goes in Weights & Biases, Trackio or TensorBoard; each needs its extra."""
    overwrite: bool = False
    """Replace the folder if it already holds an adapter."""

    def run(self, console: Console) -> None:
        """Train and write."""
        from jcrosslora.checkpoint import open_base
        from jcrosslora.checkpoint.tokenizer import load_tokenizer
        from jcrosslora.text import Completion
        from jcrosslora.text.reading import template_of
        from jcrosslora.training import read_examples, save_trained, train_lora
        from jcrosslora.utils.files import ensure_free

        ensure_free(self.out, self.overwrite)
        if self.log is not None:
            find_log(self.log)
        if self.limit is not None and self.limit < 1:
            msg = f"limit {self.limit} is out of range; it must be at least 1"
            raise UsageError(msg)
        settings = TrainingSettings(**{field.name: getattr(self, field.name) for field in fields(TrainingSettings)})
        base, examples = open_base(self.base, chat_template=self.template), read_examples(self.data)[: self.limit]
        tokenizer = load_tokenizer(base)
        shown = {"base": public_name(self.base), "data": self.data.name, **asdict(settings)}
        with log_to(self.log, self.out.resolve().name, shown):
            adapter = train_lora(base, examples, settings, checkpoints=self.checkpoints, tokenizer=tokenizer)
        made = {**asdict(settings), "task": self.data.name, "first": len(examples)}
        chats = any(isinstance(one, Completion) and not isinstance(one.prompt, str) for one in examples)
        template = template_of(tokenizer) if chats else None
        save_trained(adapter, self.out, base, made, overwrite=self.overwrite, chat_template=template)
        say(console, f"written: {self.out}")
