"""Kinds of adapters: each kind converts the tensors of its files to A and B. `config` lists the refused kinds."""

from collections.abc import Collection

from jcrosslora.adapter.config import Config
from jcrosslora.adapter.kinds.dora import DORA, OLORA, PISSA
from jcrosslora.adapter.kinds.kind import Kind
from jcrosslora.adapter.kinds.products import ADALORA, ALORA, BEAM, LOHA, LOKR, LORA_XS, PLAIN
from jcrosslora.adapter.kinds.shared import UNILORA, VBLORA, VERA
from jcrosslora.errors import AdapterError

KINDS: tuple[Kind, ...] = (
    *(DORA, PISSA, OLORA, ALORA, LORA_XS, BEAM, PLAIN),
    *(ADALORA, VERA, VBLORA, LOHA, LOKR, UNILORA),
)
TYPES = frozenset(kind.peft_type for kind in KINDS)


def kind_of(config: Config, parts: Collection[str], where: str) -> Kind:
    """Find the kind of an adapter with a `peft_type` of `TYPES`, by its configuration and the kinds of its tensors.

    Raises AdapterError if it is of two kinds that cannot be combined.
    """
    peft_type = str(config["peft_type"]).upper()
    found = [kind for kind in KINDS if kind.peft_type == peft_type and kind.applies(config, parts)]
    first, others = found[0], [kind.name for kind in found[1:] if kind is not PLAIN]
    if excluded := [name for name in others if name not in first.over]:
        msg = f"{where}: {first.name} and {excluded[0]} in one adapter are not supported; train it as one of them"
        raise AdapterError(msg)
    return first
