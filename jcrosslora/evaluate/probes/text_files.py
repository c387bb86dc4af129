"""Text files: one text a line, or JSON lines with a text, a prompt or the messages of a conversation."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from jcrosslora.errors import UsageError
from jcrosslora.text import Prompt
from jcrosslora.text.completion import parse_object, parse_prompt, prompt_text
from jcrosslora.utils.files import write_output
from jcrosslora.utils.reading import read_file

_BOM = "\ufeff"
_JSON_LINES = (".jsonl", ".ndjson")


def read_texts(path: str | Path) -> list[str]:
    """Read the texts of a file as `read_prompts` does; of a conversation the contents, one below the other."""
    return [prompt_text(prompt) for prompt in read_prompts(path)]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read the user's own prompts, of which answers are not used.

    Args:
        path: a UTF-8 file. If its name ends in .jsonl or .ndjson, each line is a JSON object with a string "text" or
            "prompt", or with "messages", [{"role", "content"}, ...], whose last answer is dropped; otherwise each line
            is a text. Blank lines are skipped.

    Raises:
        UsageError: the file is missing, unreadable, not text or empty, or a line has the wrong form.
    """
    path = Path(path)
    return parse_prompts(_read(path), str(path), json_lines=path.suffix.lower() in _JSON_LINES)


def parse_prompts(text: str, name: str, *, json_lines: bool) -> list[Prompt]:
    """Take the prompts out of the text of a file, see `read_prompts`.

    `name` is that of the file, for errors.

    Raises:
        UsageError: there is no prompt, or a line has the wrong form.
    """
    lines = text.removeprefix(_BOM).split("\n")
    found: list[Prompt]
    if json_lines:
        found = [_prompt_of(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        found = [line.removesuffix("\r") for line in lines]
    prompts = [prompt for prompt in found if prompt_text(prompt).strip()]
    if not prompts:
        msg = f"{name}: holds no text, at least one line was wanted: write one text a line"
        raise UsageError(msg)
    return prompts


def save_texts(path: str | Path, texts: Sequence[str]) -> None:
    """Write texts so that `read_texts` returns them; an existing file is replaced.

    Args:
        path: if its name ends in .jsonl or .ndjson, JSON lines are written, else one text a line.
        texts: at least one, none of them empty.

    Raises:
        UsageError: there is no text, or a text is empty, not valid UTF-8, or spans several lines of a plain file.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    json_lines = path.suffix.lower() in _JSON_LINES
    _check(texts, path, json_lines)
    lines = (json.dumps({"text": text}, ensure_ascii=False) if json_lines else text for text in texts)
    # Whole or not at all: an interrupted run must not leave a file with half of the texts.
    write_output(path, "".join(f"{line}\n" for line in lines).encode(), "choose another output")


def _read(path: Path) -> str:
    try:
        content = read_file(path)
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}): name a file with one text a line"
        raise UsageError(msg) from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        msg = f"{path}: is not UTF-8 text (byte {error.start}): save it as UTF-8 with one text a line"
        raise UsageError(msg) from error
    if "\0" in text:
        msg = f"{path}: is a binary file, UTF-8 text was wanted: name a file with one text a line"
        raise UsageError(msg)
    return text


def _prompt_of(line: str, place: str) -> Prompt:
    entry = parse_object(line)
    if "messages" in entry:
        return parse_prompt(entry["messages"], place)
    text = entry.get("text", entry.get("prompt"))
    if not isinstance(text, str):
        msg = f'{place}: is not a JSON object with a string "text": write {{"text": "..."}} on each line, '
        raise UsageError(msg + '{"prompt": "..."} or {"messages": [...]}')
    if not _is_utf8(text):
        msg = f"{place}: the text has half of a surrogate pair: write whole characters"
        raise UsageError(msg)
    return text


def _check(texts: Iterable[str], path: Path, json_lines: bool) -> None:
    texts = list(texts)
    if not texts:
        msg = f"{path}: no texts to save, at least one was wanted"
        raise UsageError(msg)
    for number, text in enumerate(texts):
        if not text.strip() or not _is_utf8(text):
            msg = f"{path}: text {number} is empty or has no UTF-8 form: leave it out"
            raise UsageError(msg)
        if not json_lines and any(sign in text for sign in ("\n", "\r", "\0", _BOM)):
            msg = f"{path}: text {number} does not fit on one line: save to a name that ends in .jsonl"
            raise UsageError(msg)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
