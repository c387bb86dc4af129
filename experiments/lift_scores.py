"""Scores of the rows of the lift table, kept on disk by question, so that a stopped run continues.

Each row has a file of its own: another method or more questions cost only what is missing. A file holds the digests of
the base, adapter and questions that it was made from, and is made anew when they change.
"""

import gc
import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from written_task import exact_matches

import jcrosslora as jcl
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import Model, load_model
from jcrosslora.evaluate import FIGURES, Question, Scores, score
from jcrosslora.utils.files import write_whole

BASE = "base"
# Questions between two writes to disk.
_PART = 200

Arrays = dict[str, np.ndarray]


class Scorer:
    """Scores of questions under a base, alone and with adapters, in one folder.

    Attributes:
        folder: of the files.
        questions: in the order in which they are scored.
    """

    def __init__(self, ref: str, questions: Sequence[Question], folder: Path):
        self.folder, self.questions = folder, questions
        self._base = jcl.open_base(ref)
        self._task = _digest(questions)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._base)

    @cached_property
    def _model(self) -> Model:
        """Load the weights, only where something has to be scored."""
        return load_model(self._base, "float32")

    def figures(self, adapters: Mapping[str, Path], limit: int | None) -> dict[str, Arrays]:
        """Score the base and each adapter: name -> each of `FIGURES` by question, float64 (n,).

        Args:
            adapters: file name -> adapter folder.
            limit: only the first so many questions.

        Raises:
            JCrossLoRAError: an adapter, the base or a question cannot be used.
        """
        questions = self.questions[:limit]
        loaded = {BASE: None, **{name: jcl.load_adapter(path, self._base) for name, path in adapters.items()}}
        made = {name: self._made(adapter) for name, adapter in loaded.items()}
        rows = {name: read_arrays(self._path(name), made[name]) for name in loaded}
        while group := next_group({name: _done(row) for name, row in rows.items()}, len(questions)):
            start, stop, names = group
            found = self._score(questions[start:stop], {name: loaded[name] for name in names})
            for name, part in found.items():
                rows[name] = _joined(rows[name], part)
                write_arrays(self._path(name), made[name], rows[name])
        return {name: figures_of(row, questions) for name, row in rows.items()}

    def exact(self, adapters: Mapping[str, Path], limit: int | None) -> dict[str, np.ndarray]:
        """Compute exact matches of the base and each adapter: name -> float64 (n,), 1 for a right answer."""
        questions, found = self.questions[:limit], {}
        for name, path in {BASE: None, **adapters}.items():
            adapter = None if path is None else jcl.load_adapter(path, self._base)
            file, made = self._path(f"{name}.exact"), self._made(adapter)
            stored = read_arrays(file, made).get("exact", np.zeros(0))
            for start in range(len(stored), len(questions), _PART):
                part = exact_matches(
                    self._base, questions[start : start + _PART], adapter, self._model, self._tokenizer
                )
                stored = np.concatenate([stored, part])
                write_arrays(file, made, {"exact": stored})
            found[name] = stored[: len(questions)]
        return found

    def _score(self, questions: Sequence[Question], adapters: Mapping[str, jcl.Adapter | None]) -> dict[str, Arrays]:
        """Compute log-probabilities and token counts; `score` always adds the base, returned only if asked for."""
        given = {name: adapter for name, adapter in adapters.items() if adapter is not None}
        scores = score(
            self._base,
            questions,
            list(given.values()),
            model=self._model,
            tokenizer=self._tokenizer,
        )
        gc.collect()
        both = dict(zip((BASE, *given), scores.log_probs, strict=True))
        return {name: {"log_probs": both[name], "tokens": scores.tokens} for name in adapters}

    def _made(self, adapter: jcl.Adapter | None) -> str:
        own = "none" if adapter is None else adapter.info.digest
        return f"base {self._base.digest()}, adapter {own}, questions {self._task}"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def next_group(done: Mapping[str, int], count: int) -> tuple[int, int, list[str]] | None:
    """Choose what to score next: first and last (exclusive) question, and the rows that are scored up to the first.

    Rows that are behind go first, up to the next ones, so that soon all run together.
    """
    start = min(done.values())
    if start >= count:
        return None
    further = [number for number in done.values() if number > start]
    return start, min([start + _PART, count, *further]), [name for name, number in done.items() if number == start]


def figures_of(row: Arrays, questions: Sequence[Question]) -> Arrays:
    """Compute each of `FIGURES` by question, float64 (n,), of one row."""
    count = len(questions)
    scores = Scores.of(("row",), questions, row["log_probs"][None, :count], row["tokens"][:count])
    return {figure: scores.by_question(figure)[0] for figure in FIGURES}


def read_arrays(path: Path, made: str) -> Arrays:
    """Read the arrays of a file; none where there is no file, or it was made from something else."""
    try:
        # Opened here: np.load leaves a truncated file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise jcl.UsageError(f"{path}: cannot be read ({error}): remove it, and it will be made again") from error
    return arrays if str(arrays.pop("made", "")) == made else {}


def write_arrays(path: Path, made: str, arrays: Arrays) -> None:
    """Write arrays and the digests that they were made from, renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, made=np.array(made), **arrays)
    write_whole(path, content.getvalue())


def _joined(row: Arrays, part: Arrays) -> Arrays:
    """Append further questions to a row; both are padded to the larger number of choices."""
    if not row:
        return part
    width = max(row["tokens"].shape[1], part["tokens"].shape[1])
    fill = {"log_probs": np.nan, "tokens": 0}
    return {name: np.concatenate([_widened(each[name], width, fill[name]) for each in (row, part)]) for name in fill}


def _widened(array: np.ndarray, width: int, fill: float) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


def _done(row: Arrays) -> int:
    return len(row["tokens"]) if row else 0


def _digest(questions: Sequence[Question]) -> str:
    found = hashlib.sha256()
    for question in questions:
        found.update(repr((question.prompt, question.choices, question.answer)).encode())
    return found.hexdigest()
