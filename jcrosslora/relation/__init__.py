"""What two bases have in common, judged by their weights: shared structure, changes of the weights, suitable method."""

from jcrosslora.relation.base_comparison import BaseComparison, compare_bases
from jcrosslora.relation.bases import Bases, compare_token_names
from jcrosslora.relation.method_selection import Choice, choose_method, compare_weights, why_not_run, without_fit
from jcrosslora.relation.pairing import DEPTH_MAPS, Pairing, pair_modules, parse_depth
from jcrosslora.relation.relation import Finding, Likeness, Relation, TensorComparison, WeightSimilarity
from jcrosslora.relation.rounding import infer_rounding
from jcrosslora.relation.structure import LayerMap, Part, Structure
from jcrosslora.relation.structure_search import find_structure
from jcrosslora.relation.wording import choice_reason, finding_phrase

__all__ = [
    "DEPTH_MAPS",
    "BaseComparison",
    "Bases",
    "Choice",
    "Finding",
    "LayerMap",
    "Likeness",
    "Pairing",
    "Part",
    "Relation",
    "Structure",
    "TensorComparison",
    "WeightSimilarity",
    "choice_reason",
    "choose_method",
    "compare_bases",
    "compare_token_names",
    "compare_weights",
    "find_structure",
    "finding_phrase",
    "infer_rounding",
    "pair_modules",
    "parse_depth",
    "why_not_run",
    "without_fit",
]
