"""LoRA-XS: dW = s B R A, where B and A are frozen (from an SVD of the base) and only R (r, r) is trained.

The format is that of https://github.com/MohammadrezaBanaei/LoRA-XS, PEFT's with one more tensor for each module,
`default_lora_latent_mapping.weight`; peft writes it as `q_proj_lora_latent_mapping.weight`. A and B are in the file; a
file without them is refused, because the signs of the singular vectors that R was trained with are not known.

Source: arXiv 2405.17604; utils/latent_utils.py and utils/merge_adapter_to_base_model.py there.
"""

import numpy as np

from jcrosslora.adapter.config import check_lora
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Kind, Update, each_module
from jcrosslora.adapter.kinds.plain import read_factors
from jcrosslora.errors import AdapterError


def _read(file: AdapterFile, module: str) -> Update:
    if "A" not in file.modules[module]:
        msg = f"{file.path}: module {module!r} of a LoRA-XS adapter has R without its A and B: the signs of the base's "
        msg += "singular vectors that it was trained with are not known; save it with lora_A and lora_B"
        raise AdapterError(msg)
    factors, latent = read_factors(file, module), file.part(module, "latent")
    if latent.shape != (factors.rank, factors.rank):
        msg = f"{file.path}: module {module!r} has R of shape {list(latent.shape)} for rank {factors.rank}"
        msg += ": the file is damaged"
        raise AdapterError(msg)
    a = latent.astype(np.float64) @ np.asarray(factors.a).astype(np.float64)
    return Update(LoRAFactors(a=a.astype(np.float32), b=factors.b, scale=factors.scale))


LORA_XS = Kind(
    name="LoRA-XS",
    peft_type="LORA",
    formula="s B R A",
    read=each_module(_read),
    check=check_lora,
    applies=lambda _, parts: "latent" in parts,
)
