"""Get next-token log-probabilities from engines, for a base alone or with an adapter."""

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jcrosslora.adapter.folder import AdapterPaths, Form
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import AdapterError, CheckpointError, JCrossLoRAError, UsageError
from jcrosslora.evaluate.torch_models import load_adapter, load_base


class Text(NamedTuple):
    """Token ids of a prompt and its completion, int32 (T,); `first` is the index of the prompt's last token."""

    ids: np.ndarray
    first: int


Answers = list[np.ndarray]  # of each text (T - first, V) log-probabilities, NaN where the engine gives none


@dataclass(frozen=True)
class Engine:
    """An engine that runs in Python.

    Attributes:
        package: its distribution.
        extra: the extra of this package that installs it.
        bases: the bases that it loads, for messages.
        run: takes a base's path, V, an adapter's files and texts; yields the base's answers, then the adapter's.
    """

    name: str
    package: str
    extra: str
    bases: str
    run: Callable[[Path, int, AdapterPaths, Sequence[Text]], Iterator[Answers]]

    @property
    def version(self) -> str:
        """The version that is installed; a UsageError says how to install it."""
        try:
            return version(self.package)
        except PackageNotFoundError as error:
            msg = f"this adapter runs in {self.name}, which is not installed: pip install 'jcrosslora[{self.extra}]'"
            raise UsageError(msg) from error

    def answers(self, base: BaseModel, adapter: AdapterPaths, texts: Sequence[Text]) -> list[Answers]:
        """Run a base, alone and with an adapter; a JCrossLoRAError says why the engine cannot load one of them."""
        found: list[Answers] = []
        try:
            for one in self.run(Path(base.path or base.ref), base.dims.vocab, adapter, texts):
                found.append(one)
        except JCrossLoRAError:
            raise
        except Exception as error:  # whatever an engine raises
            kind, what = (AdapterError, adapter.name) if found else (CheckpointError, base.ref)
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            msg = f"{what}: {self.name} cannot run it ({why}): it loads bases {self.bases}, and adapters of these"
            raise kind(msg) from error
        return found


def _run_peft(base: Path, _vocab: int, adapter: AdapterPaths, texts: Sequence[Text]) -> Iterator[Answers]:
    import torch

    def answers() -> Answers:
        with torch.inference_mode():
            rows = [model(torch.tensor([text.ids.tolist()])).logits[0, text.first :] for text in texts]
            return [torch.log_softmax(one, -1).numpy() for one in rows]

    with quiet():
        model = load_base(base, torch.float32)
    yield answers()
    with quiet():
        model = load_adapter(model, adapter)
    yield answers()


def _run_mlx(base: Path, _vocab: int, adapter: AdapterPaths, texts: Sequence[Text]) -> Iterator[Answers]:
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    def answers() -> Answers:
        model.eval()
        rows = [model(mx.array([text.ids.tolist()]))[0, text.first :].astype(mx.float32) for text in texts]
        return [np.array(one - mx.logsumexp(one, axis=-1, keepdims=True)) for one in rows]

    model = load_model(base)[0]
    yield answers()
    model = load_adapters(model, str(adapter.weights.parent))
    yield answers()


def _run_llama_cpp(base: Path, vocab: int, adapter: AdapterPaths, texts: Sequence[Text]) -> Iterator[Answers]:
    yield _in_llama_cpp(base, vocab, None, texts)
    yield _in_llama_cpp(base, vocab, adapter.weights, texts)


def _in_llama_cpp(base: Path, vocab: int, adapter: Path | None, texts: Sequence[Text]) -> Answers:
    beginnings = [text.ids[: end + 1].tolist() for text in texts for end in range(text.first, len(text.ids))]
    known = int(texts[0].ids[texts[0].first])  # last token of a prompt, a word or punctuation
    request = json.dumps([str(base), None if adapter is None else str(adapter), beginnings, known])
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp_process.py"))]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    found = np.full((len(beginnings), vocab), np.nan)
    for row, likeliest in zip(found, json.loads(done.stdout), strict=True):
        row[[int(token) for token in likeliest]] = list(likeliest.values())
    return np.split(found, np.cumsum([len(text.ids) - text.first for text in texts])[:-1])


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Collect warnings, and show no progress bars of transformers, while the block runs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # Its bar for GGUF is one of tqdm, which this does not reach.
        with redirect_stderr(io.StringIO()), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            yield heard
    finally:
        if shown:
            logging.enable_progress_bar()


ENGINES: Mapping[Form, Engine] = {
    "PEFT": Engine("peft", "peft", "torch", "in safetensors, or in GGUF if transformers reads that", _run_peft),
    "GGUF": Engine("llama.cpp", "xllamacpp", "engines", "in GGUF", _run_llama_cpp),
    "MLX": Engine("mlx_lm", "mlx-lm", "engines", "in safetensors", _run_mlx),
}
