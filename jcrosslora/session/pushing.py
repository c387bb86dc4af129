"""`jcrosslora.push_to_hub`: upload an adapter in a folder or in memory."""

from functools import partial
from pathlib import Path

from jcrosslora.report.hub import Pushed, push_folder
from jcrosslora.session.result import TransferResult


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

    The folder is checked to be a whole adapter before anything is sent, and is not changed. Other files beside the
    adapter are not uploaded, and other files in the repository stay. After a failure the same call goes on: what was
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
    push = adapter.push_to_hub if isinstance(adapter, TransferResult) else partial(push_folder, adapter)
    return push(repo_id, private=private, base_model=base_model, with_completions=with_completions, token=token)
