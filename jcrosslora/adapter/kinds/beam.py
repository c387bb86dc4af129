"""BeamLoRA: dW = s B diag(r softmax(g / tau)) A, with a gate g over the ranks.

The format is that of https://github.com/gccnlp/BeamLoRA: PEFT's with a `lora_gate` (1, r) for each module. The
temperature tau is set in its code and not in the file: 0.05, or 0.03 for learning rates below 1e-4 (its README).

Source: BeamLoRA (arXiv 2502.13604).
"""

import numpy as np

from jcrosslora.adapter.config import check_lora
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds import variants
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Kind, Update, each_module
from jcrosslora.adapter.kinds.plain import read_factors
from jcrosslora.errors import AdapterError

_TEMPERATURE = 0.05


def _read(file: AdapterFile, module: str) -> Update:
    factors = read_factors(file, module)
    gate = file.part(module, "lora_gate").astype(np.float64)
    if gate.size != factors.rank:
        msg = f"{file.path}: module {module!r} has a gate of shape {list(gate.shape)} for rank {factors.rank}"
        msg += ": the file is damaged"
        raise AdapterError(msg)
    gains = np.exp((gate - gate.max()) / _TEMPERATURE).ravel()
    gains *= factors.rank / gains.sum()
    # The most important ranks first.
    order = np.argsort(-gains, kind="stable")
    a = (gains[:, None] * np.asarray(factors.a).astype(np.float64))[order]
    return Update(LoRAFactors(a=a.astype(np.float32), b=np.asarray(factors.b)[:, order], scale=factors.scale))


BEAM = Kind(
    name="BeamLoRA",
    peft_type="LORA",
    formula="s B diag(r softmax(g / tau)) A",
    read=each_module(_read),
    check=check_lora,
    applies=lambda config, parts: variants.VARIANTS[variants.BEAM](config) or "lora_gate" in parts,
    remark=lambda _: f"its temperature is not in the file, its repository's default of {_TEMPERATURE} was taken",
)
