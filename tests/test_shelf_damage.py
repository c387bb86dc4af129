"""Shelves whose files were changed after writing: it is noticed, or it changes nothing."""

import dataclasses
import json
import random
import shutil
import tracemalloc

import numpy as np
import pytest
from probe_bases import chat_base
from shelf_adapters import NEW, write_tasks

import jcrosslora as jcl
from jcrosslora.errors import JCrossLoRAError, UsageError
from jcrosslora.shelf import ProbeSettings

FILES = ("shelf.json", "segments/000001.json", "segments/000001.safetensors", "text.safetensors", "weights.safetensors")
PROMPTS = [texts[0] for texts in NEW.values()]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A shelf with trained probes; it is not changed."""
    folder = tmp_path_factory.mktemp("whole")
    shelf = jcl.Shelf(folder / "shelf", base)
    shelf.add(write_tasks(folder / "adapters", base))
    shelf.train_probes(ProbeSettings(steps=2))
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy" / "shelf"


def results(folder, base):
    """All that a shelf says."""
    shelf = jcl.Shelf(folder, base)
    found = [shelf.search(PROMPTS, by) for by in ("text", "tfidf", "weights")]
    numbers = [array.tobytes() for one in found for array in (one.scores, one.thresholds)]
    return shelf.info, shelf.encoder_name, shelf.entries, numbers


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_or_changes_nothing(base, folder, name):
    if name.startswith("segments"):
        (folder / "text.safetensors").unlink()
    wanted, path, rng = results(folder, base), folder / name, random.Random(0)
    shutil.copytree(folder, folder.with_name("kept"))
    content, noticed = path.read_bytes(), []
    # The beginning has a header, in which a bit means more than elsewhere.
    for place in [*range(0, 64, 3), *(rng.randrange(len(content)) for _ in range(60))]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("kept"), folder)
        path.write_bytes(flipped)
        if name.startswith("segments"):
            (folder / "text.safetensors").unlink()
        try:
            assert results(folder, base) == wanted, place
        except JCrossLoRAError as error:
            noticed.append(str(error))
    assert all(str(folder) in text and "\n" not in text for text in noticed)
    assert noticed or name == "text.safetensors"  # which is made again


@pytest.mark.parametrize("name", FILES[:3])
def test_the_error_of_a_changed_file_names_it_and_says_what_to_do(base, folder, name):
    (folder / "text.safetensors").unlink()
    content = bytearray((folder / name).read_bytes())
    at = content.rindex(b"Water") if name.endswith("1.json") else content.rindex(b"2") if "shelf" in name else -1
    content[at] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"{name}: .*changed after writing.*`jcrosslora shelf add NEW"):
        jcl.Shelf(folder, base).search(PROMPTS)


def test_damaged_weight_probes_are_trained_again(base, folder):
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"weights\.safetensors: is damaged.*`jcrosslora shelf train"):
        jcl.Shelf(folder, base).search(PROMPTS, "weights")
    jcl.Shelf(folder, base).train_probes(ProbeSettings(steps=2))
    jcl.Shelf(folder, base).search(PROMPTS, "weights")


@pytest.mark.parametrize("name", ["digests", "sha256"])
def test_an_index_without_digests_is_refused(base, folder, name):
    head = json.loads((folder / "shelf.json").read_text())
    assert set(head["digests"]) == {"000001.json", "000001.safetensors"}
    del head[name]
    (folder / "shelf.json").write_text(json.dumps(head))
    with pytest.raises(UsageError, match="changed after writing"):
        jcl.Shelf(folder, base)


def test_a_rank_that_no_file_has_is_refused_before_memory_is_taken(base, whole, tmp_path):
    shelf = jcl.Shelf(tmp_path / "shelf", base)
    shelf.add(whole / "adapters")
    ((entries, vectors),) = shelf._index.blocks()
    claimed = dataclasses.replace(entries[0], rank=10**9)
    split = np.split(vectors, np.cumsum([len(one.samples) for one in entries])[:-1])
    shelf._index.change([(claimed, split[0])])
    tracemalloc.start()
    with pytest.raises(UsageError, match="has changed since it was put on the shelf"):
        jcl.Shelf(tmp_path / "shelf", base).train_probes(ProbeSettings(steps=1))
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()
