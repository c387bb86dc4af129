"""Probe texts: text that both bases are run on to compare their activations; no user data is needed."""

from jcrosslora.evaluate.examples import read_prompts, read_texts, save_texts
from jcrosslora.evaluate.probes.batches import ProbeBatch, count_positions, match_positions, probe_batches
from jcrosslora.evaluate.probes.writing import Probes, write_texts, written_probes

__all__ = [
    "ProbeBatch",
    "Probes",
    "count_positions",
    "match_positions",
    "probe_batches",
    "read_prompts",
    "read_texts",
    "save_texts",
    "write_texts",
    "written_probes",
]
