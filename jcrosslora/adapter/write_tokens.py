"""Write changes of the embedding and the output head in the format of PEFT.

Factors stay a LoRA. A matrix of which most rows change is written whole, for `modules_to_save`; single rows as
`trainable_token_indices`. Rows are written in float32 unless the dtype of the file holds them exactly, because the
change is a small difference from the base's rows. `read_tokens` describes the names.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.file_factors import DTYPES, FileDtype, file_factors, file_matrix
from jcrosslora.adapter.names import PREFIX, ending
from jcrosslora.adapter.token_updates import EMBEDDING, MODULES, TokenUpdate


def token_tensors(tokens: Sequence[TokenUpdate], dtype: FileDtype) -> dict[str, np.ndarray]:
    """Return the tensors of all changes by name.

    Raises:
        OutputError: values that are not finite or do not fit the dtype.
    """
    return {f"{PREFIX}{name}": array for update in tokens for name, array in _tensors(update, dtype)}


def token_ranks(tokens: Sequence[TokenUpdate]) -> dict[str, int]:
    """Return the rank of each module that has a LoRA."""
    return {name: update.factors.rank for update in tokens if update.factors is not None for name in update.modules}


def token_config(tokens: Sequence[TokenUpdate]) -> dict[str, Any]:
    """Return the settings for rows and whole matrices; a LoRA needs none."""
    replaced = [update for update in tokens if update.rows is not None]
    whole = sorted(ending(name) for update in replaced if update.whole for name in update.modules)
    single = {ending(update.modules[0]): update.ids.tolist() for update in replaced if not update.whole}
    config: dict[str, Any] = {"modules_to_save": whole} if whole else {}
    return config | ({"trainable_token_indices": single} if single else {})


def _tensors(update: TokenUpdate, dtype: FileDtype) -> Iterator[tuple[str, np.ndarray]]:
    if update.factors is not None:
        b = np.zeros((update.size, update.factors.rank))
        b[update.ids] = np.asarray(update.factors.b).astype(np.float64)
        factors = LoRAFactors(a=update.factors.a, b=b, scale=update.factors.scale)
        for name in update.modules:
            a, b = file_factors(name, factors, dtype)
            if name in MODULES[EMBEDDING]:
                yield f"{name}.lora_embedding_A", np.ascontiguousarray(b.T)
                yield f"{name}.lora_embedding_B", np.ascontiguousarray(a.T)
            else:
                yield f"{name}.lora_A.weight", a
                yield f"{name}.lora_B.weight", b
        return
    rows = _rows(update, dtype)
    # Single rows of a matrix that is embedding and head are written once: peft applies them to both.
    for name in update.modules if update.whole else update.modules[:1]:
        yield f"{name}.{'weight' if update.whole else 'token_adapter.trainable_tokens_delta'}", rows


def _rows(update: TokenUpdate, dtype: FileDtype) -> np.ndarray:
    """Cast the rows to the dtype of the file if it holds them exactly, else to float32."""
    assert update.rows is not None
    with np.errstate(over="ignore", under="ignore"):
        parts = [update.rows[part] for part in update.parts()]
        exact = all((rows.astype(DTYPES[dtype]).astype(rows.dtype) == rows).all() for rows in parts)
    kept = dtype if exact else "float32"
    return np.concatenate([file_matrix(update.table, rows.astype(np.float64), kept) for rows in parts])
