"""Upload an adapter's folder to the hub."""

from dataclasses import dataclass
from pathlib import Path

from jcrosslora.report.documents import REPORT
from jcrosslora.report.hub.contents import collect
from jcrosslora.report.hub.repository import Repository


@dataclass(frozen=True)
class Pushed:
    """An adapter on the hub.

    Attributes:
        url: address of the repository.
        commit: its commit with the adapter.
        files: names of the adapter's files there.
        base_model: the base that the card names; None if it names none.
        notes: what the user should know, one sentence each without a full stop.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    base_model: str | None
    notes: tuple[str, ...]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    base_model: str | None = None,
    with_completions: bool = False,
    token: str | None = None,
) -> Pushed:
    """Upload an adapter's folder as one commit, see `jcrosslora.push_to_hub`.

    Raises:
        JCrossLoRAError: the folder is not a whole adapter, or the hub refuses the upload or cannot be reached.
    """
    upload = collect(folder, base_model=base_model, with_completions=with_completions)
    repository = Repository.of(repo_id, private=private, token=token)
    found = repository.look()
    if found is not None:
        repository.check_weights(found, upload.weights)
    what = "Adapter moved by jcrosslora" if REPORT in upload.files else "Adapter uploaded by jcrosslora"
    url, commit = repository.send(upload.files, what, create=found is None)
    stays = ("the repository was private and stays so; its settings page makes it public",)
    notes = (*upload.notes, *(stays if found is not None and found.private and not private else ()))
    return Pushed(url, commit, tuple(upload.files), upload.base_model, notes)
