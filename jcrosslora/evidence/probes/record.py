"""Probe texts with their provenance."""

import hashlib
from dataclasses import dataclass

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.evidence.probes.cache import find_texts, keep_texts, texts_key
from jcrosslora.evidence.probes.writing import write_texts

COUNT, LENGTH = 288, 96


@dataclass(frozen=True)
class Probes:
    """Texts that both bases are run on.

    Attributes:
        texts: at least one.
        description: their origin, for reports, e.g. "written by HuggingFaceTB/SmolLM2-135M at temperature 1".
        seed: seed of generated or sampled texts; None for given texts.
        positions: number of matched positions of the two bases (see `count_positions`); None before it is known.
        path: file that given texts were read from; None for other texts.
    """

    texts: tuple[str, ...]
    description: str
    seed: int | None = None
    positions: int | None = None
    path: str | None = None

    def describe(self) -> str:
        """Describe the texts in a line for reports: count, source, seed, matched positions and digest."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        positions = "" if self.positions is None else f", {self.positions} matched positions"
        return f"{len(self.texts)} texts {self.description}{seed}{positions}, sha256 {self.digest()[:12]}"

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the texts as UTF-8, with a zero byte behind each."""
        joined = "".join(f"{text}\0" for text in self.texts)
        return hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()


def written_probes(
    base: BaseModel,
    count: int = COUNT,
    *,
    length: int = LENGTH,
    temperature: float = 1.0,
    seed: int = 0,
    adapter: Adapter | None = None,
    progress: bool = False,
) -> Probes:
    """Let a base write probe texts; arguments and errors are those of `write_texts`.

    Texts of the same base, adapter and settings are read from the disk cache (see `jcrosslora.evidence.probes.cache`;
    the environment variable JCROSSLORA_CACHE moves the folder).
    """
    key = texts_key(base, count, length, temperature, seed, adapter)
    texts = find_texts(key)
    if texts is None:
        texts = write_texts(
            base, count, length=length, temperature=temperature, seed=seed, adapter=adapter, progress=progress
        )
        keep_texts(key, texts)
    writer = base.name if adapter is None else f"{base.name} with an adapter"
    return Probes(tuple(texts), f"written by {writer} at temperature {temperature:g}", seed)
