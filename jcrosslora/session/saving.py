"""`jcrosslora.save_adapter` and `push_to_hub`: write an adapter that is in memory, and upload one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.contents import FileDtype
from jcrosslora.adapter.lora_xs import Frozen
from jcrosslora.adapter.save import Profile
from jcrosslora.adapter.save import save_adapter as save_folder
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base import describe_base

if TYPE_CHECKING:
    from jcrosslora.report.hub import Pushed
    from jcrosslora.session.result import TransferResult


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


def push_to_hub(
    adapter: str | Path | TransferResult,
    repo_id: str,
    *,
    private: bool = True,
    base_model: str | None = None,
    with_completions: bool = False,
    token: str | None = None,
) -> Pushed:
    """Upload an adapter to the hub as one commit: weights, configuration, model card, report and recipe.

    The folder is checked to be a whole adapter before anything is sent, and is not changed. Other files in the
    folder are not uploaded, and other files in the repository stay. After a failure the same call goes on: what was
    uploaded is not sent again.

    Args:
        adapter: a folder of PEFT or MLX or with `adapter.gguf`, such as `transfer` writes; or the result of a transfer,
            which is written in profile "portable" (its own `push_to_hub` takes others).
        repo_id: "owner/name"; the repository is created if it does not exist.
        private: whether the repository is private; False allows a public one.
        base_model: hub id of the base, for card and configuration; None takes the one that they name. A base that was
            a local file has none.
        with_completions: whether report and card keep the completions that the source wrote.
        token: hub token; None uses the token of the environment or of `hf auth login`.

    Returns:
        The address, the commit, the names of the files, and notes such as that no base model is named.

    Raises:
        AdapterError: the folder is not a whole adapter, or its card or report is damaged.
        UsageError: `repo_id` or `base_model` has not the form of a hub id.
        OutputError: not logged in, the repository is public where a private one is wanted or holds something else, the
            hub refuses the upload, or it cannot be reached.
    """
    from jcrosslora.report.hub import push_folder
    from jcrosslora.session.result import TransferResult

    push = adapter.push_to_hub if isinstance(adapter, TransferResult) else partial(push_folder, adapter)
    return push(repo_id, private=private, base_model=base_model, with_completions=with_completions, token=token)
