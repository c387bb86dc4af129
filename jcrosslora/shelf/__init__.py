"""A shelf: a folder with an index of adapters of one base, which finds the adapters that suit a prompt."""

from jcrosslora.shelf.index import Index as Index
from jcrosslora.shelf.judging import ALONE as ALONE
from jcrosslora.shelf.judging import Accuracy as Accuracy
from jcrosslora.shelf.judging import Judged as Judged
from jcrosslora.shelf.judging import accuracy as accuracy
from jcrosslora.shelf.judging import judge as judge
from jcrosslora.shelf.records import SAMPLES as SAMPLES
from jcrosslora.shelf.records import ShelfBase as ShelfBase
from jcrosslora.shelf.records import ShelfEntry as ShelfEntry
from jcrosslora.shelf.records import labelled_prompts as labelled_prompts
from jcrosslora.shelf.retrieval import Retrieved as Retrieved
from jcrosslora.shelf.shelf import Shelf as Shelf
from jcrosslora.shelf.weight_probes import ProbeSettings as ProbeSettings
