"""A folder of safetensors: `model.safetensors.index.json` decides, else `model.safetensors`; never a glob.

Repositories also ship other `*.safetensors` (Mistral's `consolidated.safetensors`, adapters): only what the index
names belongs to the model.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jcrosslora.checkpoint.jsonfile import read_json_object
from jcrosslora.checkpoint.safetensors import Entry, SafetensorsFile
from jcrosslora.checkpoint.store import renamed
from jcrosslora.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class ShardedStore:
    """The tensors of a folder; shards are opened when a tensor of theirs is asked for.

    Args:
        folder: holds the index and shards, or the single file.
        prefixes: name prefixes in the file that are replaced by others, e.g. {"language_model.": ""}; with any,
            tensors that match none are left out.

    Raises:
        CheckpointError: neither index nor single file, or an index that makes no sense.
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
        """For each file its name, the file, and all its tensors: stored name -> name in the model, None for the rest.

        Unlike `names`, this has the tensors that do not belong to the text model as well.
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
        """A read-only view in the stored dtype.

        Raises:
            CheckpointError: no such tensor, or a dtype that cannot be read.
        """
        file, stored = self._locate(name)
        return file.array(stored)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """float32 (n, columns): these rows of a matrix."""
        return self.tensor(name)[ids].astype(np.float32)

    def release(self) -> None:
        """Give resident pages back."""
        for shard in self._shards.values():
            shard.file.release()

    def sha256s(self) -> list[str]:
        """Hex digests of `files`."""
        return [self._shard(path.name).file.sha256() for path in self.files]


def read_weight_map(index: Path) -> dict[str, str]:
    """The map from tensor name to shard file of an index.

    Args:
        index: `model.safetensors.index.json`.

    Raises:
        CheckpointError: not an index, or an entry that leaves the folder.
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
    """The shards that hold tensors of the model, in index order (arguments as in `ShardedStore`)."""
    return _unique(place[0] for place in _rename(weight_map, prefixes).values())


def _rename(weight_map: Mapping[str, str], prefixes: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Name in the model -> (shard, name in the shard)."""
    places = ((renamed(stored, prefixes), (shard, stored)) for stored, shard in weight_map.items())
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
