"""Compare two bases by their weights: shared structure, differences of the weights, and the method that suits them."""

from jcrosslora.relation.base_comparison import BaseComparison as BaseComparison
from jcrosslora.relation.base_comparison import compare_bases as compare_bases
from jcrosslora.relation.bases import compare_token_names as compare_token_names
from jcrosslora.relation.channels import ChannelScales as ChannelScales
from jcrosslora.relation.channels import find_channel_scales as find_channel_scales
from jcrosslora.relation.method_selection import Choice as Choice
from jcrosslora.relation.method_selection import choose_method as choose_method
from jcrosslora.relation.method_selection import compare_weights as compare_weights
from jcrosslora.relation.method_selection import why_not_run as why_not_run
from jcrosslora.relation.method_selection import without_fit as without_fit
from jcrosslora.relation.pairing import DEPTH_MAPS as DEPTH_MAPS
from jcrosslora.relation.pairing import Pairing as Pairing
from jcrosslora.relation.pairing import pair_modules as pair_modules
from jcrosslora.relation.pairing import parse_depth as parse_depth
from jcrosslora.relation.relation import Finding as Finding
from jcrosslora.relation.relation import Likeness as Likeness
from jcrosslora.relation.relation import Relation as Relation
from jcrosslora.relation.relation import TensorComparison as TensorComparison
from jcrosslora.relation.relation import WeightSimilarity as WeightSimilarity
from jcrosslora.relation.rounding import infer_rounding as infer_rounding
from jcrosslora.relation.structure import LayerMap as LayerMap
from jcrosslora.relation.structure import Part as Part
from jcrosslora.relation.structure import Structure as Structure
from jcrosslora.relation.structure_search import find_structure as find_structure
from jcrosslora.relation.wording import choice_reason as choice_reason
from jcrosslora.relation.wording import finding_phrase as finding_phrase
