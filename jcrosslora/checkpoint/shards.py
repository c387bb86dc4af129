"""A folder of safetensors: the files that `model.safetensors.index.json` names, else `model.safetensors`.

Other `*.safetensors` in a repository (Mistral's `consolidated.safetensors`, adapters) are not part of the model.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jcrosslora.checkpoint.safetensors import Entry, SafetensorsFile
from jcrosslora.checkpoint.store import FileNames, read_json_object
from jcrosslora.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class ShardedStore:
    """The tensors of a folder; a shard is opened when one of its tensors is read.

    Raises:
        CheckpointError: neither index nor single file, or an invalid index.
    """

    def __init__(self, folder: Path, names: FileNames | None = None):
        self.folder = folder
        self._shards: dict[str, SafetensorsFile] = {}
        weight_map = self._weight_map()
        parts = (names or FileNames()).parts(weight_map)
        # Shard, and name in it, of the tensors that hold the rows of one.
        self._places = {name: [(weight_map[stored], stored) for stored in held] for name, held in parts.items()}

    def _weight_map(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            return read_weight_map(self.folder / INDEX)
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._shard(SINGLE).entries, SINGLE)
        wanted = f"{self.folder}: has neither {INDEX} nor {SINGLE}"
        if any(self.folder.glob("pytorch_model*.bin*")):
            msg = f"{wanted}, only pickle files (pytorch_model*.bin), which can run code when loaded: convert them "
            raise CheckpointError(msg + "with transformers' save_pretrained")
        if (found := next(self.folder.glob("*.gguf"), None)) is not None:
            msg = f"{wanted}: to read the GGUF file, give its path ({found})"
            raise CheckpointError(msg)
        msg = f"{wanted}: give the folder of a base model saved as safetensors"
        raise CheckpointError(msg)

    def _shard(self, name: str) -> SafetensorsFile:
        if name not in self._shards:
            self._shards[name] = SafetensorsFile(self.folder / name)
        return self._shards[name]

    def _located(self, name: str) -> list[tuple[SafetensorsFile, str]]:
        if name not in self._places:
            msg = f"{self.folder}: the checkpoint has no tensor {name!r}"
            raise CheckpointError(msg)
        found = [(self._shard(shard), stored) for shard, stored in self._places[name]]
        for opened, stored in found:
            if stored not in opened.entries:
                what = f"the index places tensor {stored!r} here, but the file does not hold it: download the shard "
                opened.file.refuse(what + "and the index again")
        return found

    def _entries(self, name: str) -> list[Entry]:
        return [file.entries[stored] for file, stored in self._located(name)]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors of the model, in index order."""
        shards = _unique(shard for held in self._places.values() for shard, _ in held)
        return tuple(self.folder / shard for shard in shards)

    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._places)

    def stored(self) -> Iterator[tuple[str, SafetensorsFile, dict[str, str | None]]]:
        """Yield each shard: its name, the file, and name in the file -> name in the model for all its tensors.

        The name in the model is None for a tensor of another part than the text model; `names` omits those.
        """
        names = {place: name for name, held in self._places.items() for place in held}
        for shard in _unique(self._weight_map().values()):
            file = self._shard(shard)
            yield shard, file, {stored: names.get((shard, stored)) for stored in file.entries}

    def rows_held(self, name: str, stored: str) -> slice:
        """Return which rows of a tensor of the model its part of this name in the files holds, all of most."""
        first = 0
        for (_, own), entry in zip(self._places[name], self._entries(name), strict=True):
            if own == stored:
                return slice(first, first + entry.shape[0]) if entry.shape else slice(None)
            first += entry.shape[0]
        msg = f"{self.folder}: {stored!r} is no part of {name!r}"
        raise CheckpointError(msg)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        shapes = [entry.shape for entry in self._entries(name)]
        whole = len(shapes) > 1 and all(shape and shape[1:] == shapes[0][1:] for shape in shapes)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if whole else shapes[0]

    def dtype(self, name: str) -> str:
        """Storage dtype, e.g. "BF16"."""
        return self._entries(name)[0].dtype

    def tensor(self, name: str) -> np.ndarray:
        """Return a read-only view in the stored dtype, a copy of a tensor that is stored in parts."""
        arrays = [file.array(stored) for file, stored in self._located(name)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

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
    """Read the map from tensor name to shard file in an index; refuse an entry outside the folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        msg = f"{index}: has no 'weight_map' with tensors: download the index again"
        raise CheckpointError(msg)
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors")
        if not plain or any(mark in shard for mark in ("/", "\\", ":", "\0")):
            msg = f"{index}: tensor {name!r} is placed in {shard!r}, which is not a *.safetensors file of the folder"
            raise CheckpointError(msg)
    return weight_map


def shards_of(weight_map: Mapping[str, str], names: FileNames) -> list[str]:
    """List the shards that hold tensors of the model, in index order; arguments as in `ShardedStore`."""
    return _unique(weight_map[stored] for held in names.parts(weight_map).values() for stored in held)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
