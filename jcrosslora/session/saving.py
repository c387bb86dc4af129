"""`jcrosslora.save_adapter`: write an adapter that is in memory."""

from pathlib import Path

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.contents import FileDtype
from jcrosslora.adapter.lora_xs import Frozen
from jcrosslora.adapter.save import Profile
from jcrosslora.adapter.save import save_adapter as save_folder
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base_info import describe_base


def save_adapter(
    adapter: Adapter,
    out: str | Path,
    *,
    base: BaseModel | None = None,
    base_name: str | None = None,
    profile: Profile = "portable",
    dtype: FileDtype = "float32",
    overwrite: bool = False,
    frozen: Frozen | None = None,
) -> Path:
    """Write an adapter as a folder. Results of `transfer` have their own method `save`.

    Args:
        adapter: what to write. Its changes of embedding and head are written by profile "peft" only.
        out: the folder; it appears whole or not at all.
        base: the base that it is for; profiles gguf and lora-xs need it.
        base_name: `base_model_name_or_path`; None is the name of the base.
        profile: "portable" is PEFT's format with every module padded to one rank, and alpha equal to it, which all
            engines read alike; "peft" keeps a rank for each module in patterns; "mlx" is the folder of mlx_lm, and
            "gguf" the file `adapter.gguf` of llama.cpp; "lora-xs" holds the part of each update in the span of
            `frozen`.
        dtype: number format of the file.
        overwrite: whether an adapter already there may be replaced.
        frozen: for profile lora-xs, from `jcrosslora.adapter.frozen_factors`.

    Returns:
        The folder.

    Raises:
        OutputError: the place exists, cannot be written to or is full, or the numbers do not fit the format.
    """
    return save_folder(
        adapter,
        out,
        base=None if base is None else describe_base(base, digest=""),
        base_name=base_name,
        profile=profile,
        dtype=dtype,
        overwrite=overwrite,
        frozen=frozen,
    )
