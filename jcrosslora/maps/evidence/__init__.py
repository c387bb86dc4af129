"""Evidence for methods: its records, and the providers that collect it from two bases."""

from jcrosslora.maps.evidence.records import Activations as Activations
from jcrosslora.maps.evidence.records import Evidence as Evidence
from jcrosslora.maps.evidence.records import EvidenceKind as EvidenceKind
from jcrosslora.maps.evidence.records import HeadMatch as HeadMatch
from jcrosslora.maps.evidence.records import Maps as Maps
from jcrosslora.maps.evidence.records import Selection as Selection
from jcrosslora.maps.evidence.records import Side as Side
from jcrosslora.maps.evidence.records import Vocabulary as Vocabulary
