"""What two bases have in common, judged by their weights: shared structure, changes of the weights, suitable method."""

from jcrosslora.lineage.structure import Part as Part
from jcrosslora.lineage.structure import Structure as Structure
from jcrosslora.lineage.structure_search import find_structure as find_structure
from jcrosslora.lineage.tensor_comparison import TensorComparison as TensorComparison
