"""`jcrosslora train`, `extract`, `export`, `merge` and `push`: make an adapter, write it elsewhere."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import tyro
from rich.console import Console

from jcrosslora.adapter.export import ExportSettings, export_adapter
from jcrosslora.adapter.extract import ExtractSettings, Kept
from jcrosslora.adapter.merge import MergeSettings, merge
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.cli.flags import settings_of
from jcrosslora.cli.output import ASKED_FOR, FailOnLoss, Long, print_json, print_pushed, print_table, say, warn
from jcrosslora.errors import UsageError
from jcrosslora.training.checkpoints import TrainingSettings
from jcrosslora.utils.logs import LogName, find_log, log_to


@dataclass(frozen=True, kw_only=True)
class Train(Long, TrainingSettings):
    """Train a LoRA adapter of a base model on the answers of examples, and write it as a PEFT folder."""

    base: tyro.conf.Positional[str]
    """The base model: a folder of safetensors, a GGUF file or a hub id."""
    data: Path
    """JSONL with {"messages"}, {"prompt", "answer"} or {"question", "choices", "answer": index} on each line."""
    out: Path
    """The folder to write."""
    start: str | None = None
    """Continue training this plain LoRA of the base, with its rank, alpha and modules: a folder, a GGUF file or a hub
    id."""
    template: Path | None = None
    """File with a chat template for conversations, instead of the base's."""
    limit: int | None = None
    """Use the first N examples."""
    checkpoints: Path | None = None
    """Folder for checkpoints: the same command continues from the newest."""
    log: LogName | None = None
    """Log the loss to Weights & Biases, Trackio or TensorBoard; each needs its extra."""
    overwrite: bool = False
    """Replace the folder if it already holds an adapter."""

    def run(self, console: Console) -> None:
        from jcrosslora.adapter import load_adapter
        from jcrosslora.checkpoint import load_tokenizer, open_base
        from jcrosslora.text import Completion
        from jcrosslora.text.reading import template_of, tokenizer_of
        from jcrosslora.training import read_examples, save_trained, train_lora
        from jcrosslora.utils.files import ensure_free, is_within

        ensure_free(self.out, self.overwrite)
        if self.checkpoints is not None and is_within(self.checkpoints, self.out):
            msg = f"checkpoints {self.checkpoints} lie in the folder of the adapter, {self.out}, which is written at "
            raise UsageError(msg + "the end: give a folder outside of it")
        if self.log is not None:
            find_log(self.log)
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit {self.limit} is out of range; it must be at least 1")
        settings = settings_of(self, TrainingSettings)
        base, examples = open_base(self.base, chat_template=self.template), read_examples(self.data)[: self.limit]
        tokenizer, start = load_tokenizer(base), None
        facts = {**asdict(settings), **dict(zip(("rank", "alpha"), settings.size, strict=True))}
        if self.start is not None:
            start = load_adapter(self.start, base, replaced=True)
            facts = {**asdict(settings), "start": {"name": public_name(self.start), "digest": start.info.digest}}
            tokenizer = tokenizer_of(base, start.info.chat_template)
        shown, states = {"base": public_name(self.base), "data": self.data.name, **facts}, self.checkpoints
        with log_to(self.log, self.out.resolve().name, shown):
            adapter = train_lora(base, examples, settings, start=start, checkpoints=states, tokenizer=tokenizer)
        made = {**facts, "task": self.data.name, "first": len(examples)}
        chats = any(isinstance(one, Completion) and not isinstance(one.prompt, str) for one in examples)
        template = template_of(tokenizer) if chats else None
        save_trained(adapter, self.out, base, made, overwrite=self.overwrite, chat_template=template)
        say(console, f"written: {self.out}")


@dataclass(frozen=True, kw_only=True)
class Extract(Long, ExtractSettings):
    """Extract a LoRA adapter from a full fine-tune and its base: the low-rank part of their difference."""

    finetune: tyro.conf.Positional[str]
    """The fine-tuned model: a folder of safetensors, a GGUF file or a hub id."""
    base: str
    """The base that it was trained from, in the same forms."""
    out: Path
    """The folder to write."""
    finetune_revision: str | None = None
    """Hub revision of the fine-tune."""
    base_revision: str | None = None
    """Hub revision of the base."""
    json: bool = False
    """Print the figures as JSON, with those of each module."""
    overwrite: bool = False
    """Replace the folder if it already holds an adapter."""

    def run(self, console: Console) -> None:
        from jcrosslora.adapter.extract import extract_with_figures
        from jcrosslora.checkpoint import open_base
        from jcrosslora.utils.files import ensure_free

        ensure_free(self.out, self.overwrite)
        finetune = open_base(self.finetune, revision=self.finetune_revision)
        base = open_base(self.base, revision=self.base_revision)
        found = extract_with_figures(finetune, base, settings_of(self, ExtractSettings))
        found.save(self.out, self.overwrite)
        if self.json:
            print_json(found.to_json())
            return
        columns = ("kind", "modules", "rank", "share of difference", "kept", "relative error")
        print_table(console, columns, map(_figures, found.rows), title=f"difference at {found.settings.rule}")
        for note in found.notes:
            say(console, f"note: {note}")
        if found.left_out:
            named = ", ".join(f"{kind} ({found.shares[kind]:.1%} of the whole difference)" for kind in found.left_out)
            able = [kind for kind in found.left_out if kind in get_args(Kept)]
            say(console, f"left out: {named}" + (f"; --keep {' '.join(able)} keeps them whole" if able else ""))
        say(console, f"written: {self.out}")


def _figures(row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["ranks"]
    ranks = str(low) if low == high else f"{low} to {high}"
    return row["kind"], str(row["modules"]), ranks, f"{row['share']:.1%}", f"{row['kept']:.1%}", f"{row['error']:.3g}"


@dataclass(frozen=True)
class Export(ExportSettings):
    """Write an adapter for another engine or at another rank, or the sum of several adapters."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"expert": ("keep_dora", "alpha", "dtype", "base_revision")}

    adapter: tyro.conf.Positional[tuple[str, ...]]
    fail_on: FailOnLoss = "never"
    """loss: exit with code 3 if part of an adapter is lost; the rest is still written."""

    def run(self, console: Console) -> int:
        exported = export_adapter(settings_of(self, ExportSettings))
        warn(exported.warnings)
        for sentence in exported.losses:
            say(console, f"lost: {sentence}")
        if exported.truncation is not None:
            say(console, f"truncation: {exported.truncation.sentence}")
        if exported.magnitudes is not None:
            say(console, f"kept: a DoRA, with the magnitudes of its {len(exported.magnitudes)} modules")
        for sentence in () if exported.split is None else exported.split.sentences:
            say(console, sentence)
        for sentence in exported.adapter.info.ignored:
            say(console, f"not written: {sentence}")
        lost = bool(exported.losses or exported.adapter.info.ignored)
        if exported.merged is not None:
            for note in exported.merged.notes:
                say(console, f"note: {note}")
            say(console, f"written: {exported.merged.folder} (the base, {exported.merged.modules} modules changed)")
        elif self.absorb is not None:
            say(console, "base: nothing goes into it, so none was written")
        say(console, f"written: {self.out}{' (without parts of the adapter, see above)' if lost else ''}")
        return ASKED_FOR if self.fail_on == "loss" and lost else 0


@dataclass(frozen=True)
class Merge(MergeSettings):
    """Merge an adapter into its base and write a whole checkpoint, for engines that take no adapters."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"expert": ("dtype", "base_revision", "adapter_revision")}

    base: tyro.conf.Positional[str]
    adapter: tyro.conf.Positional[str]
    fail_on: FailOnLoss = "never"
    """loss: exit with code 3 if part of the adapter is not merged; the rest is still written."""

    def run(self, console: Console) -> int:
        merged = merge(settings_of(self, MergeSettings))
        for sentence in merged.notes:
            say(console, sentence)
        left = ", without parts of the adapter, see above" if merged.lost else ""
        say(console, f"written: {merged.folder} ({merged.modules} modules changed{left})")
        return ASKED_FOR if self.fail_on == "loss" and merged.lost else 0


@dataclass(frozen=True)
class Push:
    """Upload an adapter's folder to the hub: weights, model card, report and recipe. The folder is not changed.

    The token comes from HF_TOKEN or `hf auth login`. After a failure, repeat the command.
    """

    folder: tyro.conf.Positional[Path]
    """The adapter: a folder of PEFT or MLX, or with adapter.gguf, such as `jcrosslora transfer` writes."""
    repo_id: tyro.conf.Positional[str]
    """Where to: OWNER/NAME. Creates the repository if missing."""
    public: bool = False
    """Make the repository public, or allow an existing one to be; else it is private."""
    base_model: str | None = None
    """Hub id of the base, for card and configuration, if the base was a local file."""
    with_completions: bool = False
    """Also upload the completions that the source wrote; they may be private."""
    dry_run: bool = False
    """Only check the folder and show what would be uploaded, without a connection."""
    json: bool = False
    """Print what was uploaded as JSON."""

    def run(self, console: Console) -> None:
        from jcrosslora.report.hub import check_repo_id, push_to_hub
        from jcrosslora.report.upload import collect

        settings: dict[str, Any] = {"base_model": self.base_model, "with_completions": self.with_completions}
        if not self.dry_run:
            try:
                pushed = push_to_hub(self.folder, self.repo_id, private=not self.public, **settings)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{self.repo_id} may exist already, and the same command goes on") from None
            if self.json:
                print_json(asdict(pushed))
            else:
                print_pushed(pushed, console)
            return
        check_repo_id(self.repo_id)
        upload = collect(self.folder, **settings)
        sizes = {
            name: len(sent) if isinstance(sent, bytes) else sent.stat().st_size for name, sent in upload.files.items()
        }
        if self.json:
            print_json({"files": sizes, "base_model": upload.base_model, "notes": upload.notes})
            return
        for note in upload.notes:
            say(console, f"note: {note}")
        say(console, f"base model: {upload.base_model or 'none'}")
        for name, size in sizes.items():
            say(console, f"would upload: {name} ({size:,} bytes)")
