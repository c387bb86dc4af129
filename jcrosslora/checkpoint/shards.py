"""A folder of safetensors: the files that `model.safetensors.index.json` names, else `model.safetensors`.

Other `*.safetensors` in a repository (Mistral's `consolidated.safetensors`, adapters) are not part of the model.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jcrosslora.checkpoint.jsonfile import read_json_object
from jcrosslora.checkpoint.safetensors import Entry, SafetensorsFile
from jcrosslora.checkpoint.store import text_model_name
from jcrosslora.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class ShardedStore:
    """The tensors of a folder; a shard is opened when one of its tensors is read.

    Args:
        folder: of the index and shards, or of the single file.
        prefixes: renames tensors, see `text_model_name`.

    Raises:
        CheckpointError: neither index nor single file, or an invalid index.
    """

    def __init__(self, folder: Path, prefixes: Mapping[str, str] | None = None):
        self.folder = folder
        self._shards: dict[str, SafetensorsFile] = {}
        self._places = _rename(self._weight_map(), prefixes or {})

    def _weight_map(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            return read_weight_map(self.folder / INDEX)
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._shard(SINGLE).entries, SINGLE)
        raise CheckpointError(_nothing_to_read(self.folder))

    def _shard(self, name: str) -> SafetensorsFile:
        if name not in self._shards:
            self._shards[name] = SafetensorsFile(self.folder / name)
        return self._shards[name]

    def _locate(self, name: str) -> tuple[SafetensorsFile, str]:
        if name not in self._places:
            msg = f"{self.folder}: the checkpoint has no tensor {name!r}"
            raise CheckpointError(msg)
        shard, stored = self._places[name]
        file = self._shard(shard)
        if stored not in file.entries:
            msg = (
                f"{self.folder / shard}: the index places tensor {stored!r} here, but the file does not hold it: "
                "download the shard and the index again"
            )
            raise CheckpointError(msg)
        return file, stored

    def _entry(self, name: str) -> Entry:
        file, stored = self._locate(name)
        return file.entries[stored]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors of the model, in index order."""
        return tuple(self.folder / shard for shard in _unique(place[0] for place in self._places.values()))

    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._places)

    def stored(self) -> Iterator[tuple[str, SafetensorsFile, dict[str, str | None]]]:
        """Yield each shard: its name, the file, and name in the file -> name in the model for all its tensors.

        The name in the model is None for a tensor of another part than the text model; `names` omits those.
        """
        names = {place: name for name, place in self._places.items()}
        for shard in _unique(self._weight_map().values()):
            file = self._shard(shard)
            yield shard, file, {stored: names.get((shard, stored)) for stored in file.entries}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Storage dtype, e.g. "BF16"."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> np.ndarray:
        """Return a read-only view in the stored dtype.

        Raises:
            CheckpointError: no such tensor, or a dtype that cannot be read.
        """
        file, stored = self._locate(name)
        return file.array(stored)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Read rows of a matrix or of a stack of matrices, as float32 (n, columns)."""
        array = self.tensor(name)
        return array.reshape(-1, array.shape[-1])[ids].astype(np.float32)

    def release(self) -> None:
        """Give the resident pages back to the system."""
        for shard in self._shards.values():
            shard.file.release()

    def sha256s(self) -> list[str]:
        """Hex digests of `files`."""
        return [self._shard(path.name).file.sha256() for path in self.files]


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the map from tensor name to shard file in an index.

    Args:
        index: `model.safetensors.index.json`.

    Raises:
        CheckpointError: not an index, or an entry outside the folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        msg = f"{index}: has no 'weight_map' with tensors: download the index again"
        raise CheckpointError(msg)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            msg = f"{index}: tensor {name!r} is placed in {shard!r}, which is not a *.safetensors file of the folder"
            raise CheckpointError(msg)
    return weight_map


def shards_of(weight_map: Mapping[str, str], prefixes: Mapping[str, str]) -> list[str]:
    """List the shards that hold tensors of the model, in index order; arguments as in `ShardedStore`."""
    return _unique(place[0] for place in _rename(weight_map, prefixes).values())


def _rename(weight_map: Mapping[str, str], prefixes: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Map each name in the model to its shard and its name in the shard."""
    places = ((text_model_name(stored, prefixes), (shard, stored)) for stored, shard in weight_map.items())
    return {name: place for name, place in places if name is not None}


def _is_plain_name(shard: str) -> bool:
    return shard.endswith(".safetensors") and not any(mark in shard for mark in ("/", "\\", ":", "\0"))


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _nothing_to_read(folder: Path) -> str:
    wanted = f"{folder}: has neither {INDEX} nor {SINGLE}"
    if any(folder.glob("pytorch_model*.bin*")):
        return (
            f"{wanted}, only pickle files (pytorch_model*.bin), which can run code when loaded: "
            "convert them with transformers' save_pretrained"
        )
    if (found := next(folder.glob("*.gguf"), None)) is not None:
        return f"{wanted}: to read the GGUF file, give its path ({found})"
    return f"{wanted}: give the folder of a base model saved as safetensors"
