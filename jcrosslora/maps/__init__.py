"""The base classes of methods, and what map methods share: evidence, alignment and shift."""

from jcrosslora.maps.evidence import Activations as Activations
from jcrosslora.maps.evidence import ChannelPair as ChannelPair
from jcrosslora.maps.evidence import Evidence as Evidence
from jcrosslora.maps.evidence import EvidenceKind as EvidenceKind
from jcrosslora.maps.evidence import Maps as Maps
from jcrosslora.maps.evidence import Selection as Selection
from jcrosslora.maps.evidence import Side as Side
from jcrosslora.maps.evidence import Vocabulary as Vocabulary
from jcrosslora.maps.method import DEFAULT_SVD_RANK as DEFAULT_SVD_RANK
from jcrosslora.maps.method import MapMethod as MapMethod
from jcrosslora.maps.method import Method as Method
from jcrosslora.maps.method import Plan as Plan
from jcrosslora.maps.moved import Moved as Moved
