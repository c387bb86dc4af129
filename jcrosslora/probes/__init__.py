"""Probe texts: text that both bases are run on so that their activations can be compared; no user data is needed."""

from jcrosslora.probes.batches import ProbeBatch, count_positions, probe_batches
from jcrosslora.probes.matching import match_positions
from jcrosslora.probes.random_text import random_texts
from jcrosslora.probes.record import Probes, written_probes
from jcrosslora.probes.text_files import read_texts, save_texts
from jcrosslora.probes.writing import write_texts

__all__ = [
    "ProbeBatch",
    "Probes",
    "count_positions",
    "match_positions",
    "probe_batches",
    "random_texts",
    "read_texts",
    "save_texts",
    "write_texts",
    "written_probes",
]
