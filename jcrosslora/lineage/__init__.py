"""What two bases have in common, judged by their weights: shared structure, changes of the weights, suitable method."""

from jcrosslora.lineage.base_comparison import BaseComparison as BaseComparison
from jcrosslora.lineage.base_comparison import compare_bases as compare_bases
from jcrosslora.lineage.method_selection import Choice as Choice
from jcrosslora.lineage.method_selection import choose_method as choose_method
from jcrosslora.lineage.method_selection import why_not_run as why_not_run
from jcrosslora.lineage.method_selection import without_fit as without_fit
from jcrosslora.lineage.pairing import DEPTH_MAPS as DEPTH_MAPS
from jcrosslora.lineage.pairing import Pairing as Pairing
from jcrosslora.lineage.pairing import pair_modules as pair_modules
from jcrosslora.lineage.pairing import parse_depth as parse_depth
from jcrosslora.lineage.structure import Part as Part
from jcrosslora.lineage.structure import Structure as Structure
from jcrosslora.lineage.structure_search import find_structure as find_structure
from jcrosslora.lineage.tensor_comparison import TensorComparison as TensorComparison
from jcrosslora.lineage.weight_similarity import compare_weights as compare_weights
