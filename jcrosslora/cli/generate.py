"""`jcrosslora generate`: generate text with one or several adapters."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import tyro
from rich.console import Console

from jcrosslora.cli.output import OnDevice, opened_base, opened_shelf, print_json, say, title_of, warn
from jcrosslora.errors import UsageError
from jcrosslora.utils.texts import visible

if TYPE_CHECKING:
    import numpy as np

    from jcrosslora.shelf.composition import Composed
    from jcrosslora.text import Prompt

STDIN = "-"
_TITLE = 60  # characters of a prompt above its answer


@dataclass(frozen=True)
class Generate(OnDevice):
    """Generate text with a base and one or several adapters."""

    base: str | None = None
    """The base model: a folder of safetensors, a GGUF file or a hub id. A shelf knows its own."""
    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to answer, or to continue."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An adapter of this base; may be given several times."""
    shelf: Path | None = None
    """A shelf of adapters, instead of --adapter: each prompt gets those that suit it, or the base alone."""
    top: int = 1
    """Use at most N adapters of the shelf for a prompt."""
    compose: str = "mixture"
    """How several adapters combine: select, mixture, gated, router, stack or uniform; or a folder
    with a saved composition and its adapters."""
    weights: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A non-negative number for each adapter, such as 1,0,0.5; once for all prompts, or once for each prompt. With 0
    for all, the base answers alone."""
    prompts: str | None = None
    """File with a prompt a line, or JSONL with {"prompt"} or {"messages"}; - reads standard input, in either form."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether a prompt is a user's message in the chat template: auto does so if the base or an adapter has one and the
    adapters were not moved with only plain texts, or if the adapters of the shelf that suit it read conversations."""
    template: Path | None = None
    """File with a chat template, instead of the base's own."""
    max_new_tokens: int = 128
    """Maximum length of answers in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 decodes greedily."""
    seed: int = 0
    """Seed of the sampling."""
    json: bool = False
    """Print the answers as JSON."""

    def run(self, console: Console) -> None:
        from jcrosslora.adapter.origin import other_base
        from jcrosslora.adapter.records import why_idle
        from jcrosslora.decoder.generate import LONGEST_PROMPT, count_cut

        prompts = self._prompts()
        if self.shelf is None:
            if self.top != 1:
                msg = f"top {self.top} was given and no shelf, of whose adapters it speaks: give one with --shelf"
                raise UsageError(msg)
            composed, rows = self._composed(), [_numbers(row) for row in self.weights]
            weights = rows[0] if len(rows) == 1 else rows or None
            chats = [_has_template(composed) and not self._read_plain()] * len(prompts)
            notes = _notes(composed, self.compose)
        else:
            composed, weights, chats = self._found(prompts)
            notes = [*_notes(composed, self.compose), *_chosen(prompts, composed.names, weights)]
        warn(doubt for one in composed.adapters for doubt in (other_base(one.info, composed.base), why_idle(one)))
        for note in notes:
            print(f"note: {visible(note, keep='')}", file=sys.stderr)
        asked = [self._asked(one, chat) for one, chat in zip(prompts, chats, strict=True)]
        if cut := count_cut(composed.tokenizer, asked):
            most = f"{LONGEST_PROMPT:,} tokens"
            print(f"note: {cut} of {len(asked)} prompts are cut to their last {most}", file=sys.stderr)
        found = composed.write(
            asked, weights=weights, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed
        )
        if self.json:
            from jcrosslora.text.completion import message_entries

            shown = [one if isinstance(one, str) else message_entries(one) for one in prompts]
            pairs = zip(shown, found, strict=True)
            print_json([{"prompt": prompt, "text": one.text, "ended": one.ended} for prompt, one in pairs])
            return
        for number, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
            if len(prompts) > 1:
                if number:
                    say(console, "")
                say(console, f"> {title_of(prompt, _TITLE)}")
            for line in one.text.split("\n"):
                say(console, line)

    def _prompts(self) -> "Sequence[Prompt]":
        from jcrosslora.evaluate.examples import parse_prompts, read_prompts

        if bool(self.prompt) == (self.prompts is not None):
            came = f"both texts and the file {self.prompts} were" if self.prompt else "no prompt was"
            raise UsageError(f"{came} given: give texts, or a file with --prompts")
        if self.prompts is None:
            return self.prompt
        if self.prompts != STDIN:
            return read_prompts(self.prompts)
        text = sys.stdin.read()
        return parse_prompts(text, "standard input", json_lines=text.lstrip().startswith("{"))

    def _read_plain(self) -> bool:
        """Whether the adapters were moved with plain texts alone, by the completions in their folders."""
        from jcrosslora.shelf.records import written_samples

        read = [one for ref in self.adapter for one in written_samples(Path(ref).expanduser())[0]]
        return bool(read) and all(isinstance(one, str) for one in read)

    def _found(self, prompts: "Sequence[Prompt]") -> "tuple[Composed, np.ndarray, list[bool]]":
        """Return the adapters that suit the prompts, their weights, and whether each prompt is a message."""
        import numpy as np

        from jcrosslora.shelf.composition import COMPOSITIONS, find_composition

        other = "--adapter" if self.adapter else "--weights" if self.weights else None
        if other is not None:
            msg = f"{other} was given with the shelf {self.shelf}, which chooses the adapters: leave one of them out"
            raise UsageError(msg)
        if self.compose not in COMPOSITIONS and Path(self.compose).expanduser().is_dir():
            msg = f"{self.compose}: brings its adapters, and those of the shelf {self.shelf} were asked for: leave one "
            raise UsageError(msg + f"of them out, or compose by one of {', '.join(COMPOSITIONS)}")
        how = find_composition(self.compose)
        shelf = opened_shelf(cast("Path", self.shelf), self.base, self.template)
        composed, weights = shelf.compose(prompts, how, top=self.top, seed=self.seed)
        # An adapter reads prompts as it read those of its move; samples that a user gave do not tell their form.
        entries = [shelf.entry(name) for name in composed.names]
        spoken = np.array([any(not isinstance(text, str) for text in one.samples) for one in entries])
        read = np.array([one.samples_from == "completions" and bool(one.samples) for one in entries])
        template = _has_template(composed)
        plain = [bool(row.any()) and all((read & ~spoken)[row]) for row in weights > 0]
        chats = [template or bool(spoken[row].any()) for row in weights > 0]
        return composed, weights, [chat and not text for chat, text in zip(chats, plain, strict=True)]

    def _composed(self) -> "Composed":
        from jcrosslora.shelf.composition import COMPOSITIONS, compose, load_composition

        base = opened_base(self.base, self.template)
        if self.compose in COMPOSITIONS or not Path(self.compose).expanduser().is_dir():
            return compose(base, self.adapter, self.compose, seed=self.seed)
        if self.adapter:
            msg = f"{self.compose} has its adapters, and {self.adapter[0]} was given too: "
            raise UsageError(msg + "leave one of them out")
        return load_composition(self.compose, base)

    def _asked(self, prompt: "Prompt", usual: bool) -> "Prompt":
        from jcrosslora.text import Message

        chat = usual if self.chat == "auto" else self.chat == "always"
        return (Message("user", prompt),) if chat and isinstance(prompt, str) else prompt


def _has_template(composed: "Composed") -> bool:
    """Tell whether the base has a chat template, or an adapter was fitted to conversations in another one."""
    every = [composed.tokenizer.chat_template, *(one.info.chat_template for one in composed.adapters)]
    return any(template is not None for template in every)


def _numbers(row: str) -> list[float]:
    try:
        return [float(part) for part in row.split(",")]
    except ValueError:
        raise UsageError(f"weights {row!r}: expected a number for each adapter, such as 1,0,0.5") from None


def _notes(composed: "Composed", how: str) -> list[str]:
    """Print which changes are not run, and whether a gate is untrained."""
    notes = [f"{one.info.name}: {sentence}" for one in composed.adapters for sentence in one.info.ignored]
    notes += composed.other_templates()
    if composed.how.trained and how == composed.how.name and len(composed.adapters) > 1:
        notes += [f"{how} is not trained and takes all adapters alike; train it with Composed.fit and give its folder"]
    return notes


def _chosen(prompts: "Sequence[Prompt]", names: Sequence[str], weights: "np.ndarray") -> list[str]:
    """Say which adapters each prompt gets."""
    found = [", ".join(name for name, weight in zip(names, row, strict=True) if weight) for row in weights]
    return [f"{own or 'the base alone'}: {title_of(one, _TITLE)}" for one, own in zip(prompts, found, strict=True)]
