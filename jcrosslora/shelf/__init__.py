"""A folder of adapters of one base with an index, from which those are found that suit a prompt."""

from jcrosslora.shelf.retrieval.retrieved import Retrieved as Retrieved
from jcrosslora.shelf.shelf import Shelf as Shelf
