"""A folder of adapters of one base with an index, in which the adapters that suit a prompt are found."""

from jcrosslora.shelf.index import Index
from jcrosslora.shelf.judging import ALONE, Accuracy, Judged, accuracy, judge
from jcrosslora.shelf.records import SAMPLES, ShelfBase, ShelfEntry, labelled_prompts, spread
from jcrosslora.shelf.retrieval import Retrieved
from jcrosslora.shelf.shelf import Shelf
from jcrosslora.shelf.weight_probes import ProbeSettings

__all__ = [
    "ALONE",
    "SAMPLES",
    "Accuracy",
    "Index",
    "Judged",
    "ProbeSettings",
    "Retrieved",
    "Shelf",
    "ShelfBase",
    "ShelfEntry",
    "accuracy",
    "judge",
    "labelled_prompts",
    "spread",
]
