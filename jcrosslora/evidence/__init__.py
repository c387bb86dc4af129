"""Evidence for methods: its records, and the providers that collect it from two bases."""

from jcrosslora.evidence.records import Activations as Activations
from jcrosslora.evidence.records import Evidence as Evidence
from jcrosslora.evidence.records import EvidenceKind as EvidenceKind
from jcrosslora.evidence.records import HeadMatch as HeadMatch
from jcrosslora.evidence.records import Maps as Maps
from jcrosslora.evidence.records import Selection as Selection
from jcrosslora.evidence.records import Side as Side
from jcrosslora.evidence.records import Vocabulary as Vocabulary
