"""Probe texts: text that both bases are run on to compare their activations; no user data is needed."""

from jcrosslora.evidence.probes.batches import ProbeBatch, count_positions, match_positions, probe_batches
from jcrosslora.evidence.probes.record import Probes, written_probes
from jcrosslora.evidence.probes.text_files import read_prompts, read_texts, save_texts
from jcrosslora.evidence.probes.writing import write_texts

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
