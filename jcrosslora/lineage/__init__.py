"""What two bases have in common, by their weights: which part of one is which of the other, and what became of it."""

from jcrosslora.lineage.comparison import Compared as Compared
from jcrosslora.lineage.comparison import compare_modules as compare_modules
from jcrosslora.lineage.comparison import compare_rest as compare_rest
from jcrosslora.lineage.difference import Difference as Difference
from jcrosslora.lineage.finding import find_structure as find_structure
from jcrosslora.lineage.parts import Part as Part
from jcrosslora.lineage.parts import parts_of as parts_of
from jcrosslora.lineage.structure import Structure as Structure
