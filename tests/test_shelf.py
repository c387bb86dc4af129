"""A shelf on disk: what is added, what is refused and listed, and what a stop leaves."""

import dataclasses
import json

import numpy as np
import pytest
from command_line import main
from probe_bases import chat_base, write_base
from safetensors.numpy import load_file, save_file
from shelf_adapters import TASKS, write_adapter, write_tasks
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.errors import OutputError, UsageError
from jcrosslora.shelf import Index, ShelfBase, ShelfEntry
from jcrosslora.shelf import adding as adding_module
from jcrosslora.shelf import index as index_module
from jcrosslora.training import TrainingSettings, save_trained

BASE = ShelfBase("tiny", "../base", "sha256:1", "llama")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def output(base, tmp_path_factory):
    """A folder as a batch writes it: three adapters, one of another base, one that is damaged."""
    folder = tmp_path_factory.mktemp("output")
    write_tasks(folder / "one", base)
    write_adapter(folder / "other", base, digest="sha256:2")
    weights = write_adapter(folder / "damaged", base, digest=base.digest()) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.fixture(scope="module")
def shelf(base, output, tmp_path_factory):
    made = jcl.Shelf(tmp_path_factory.mktemp("shelf"), base)
    made.add(output)
    return made


def entries(count: int, start: int = 0) -> list[tuple[ShelfEntry, np.ndarray]]:
    rng = np.random.default_rng(start)
    return [
        (
            ShelfEntry(f"a{n}", f"a{n}", "sha256:3", True, "LoRA", 2, 4, 10, samples=("x",) * (n % 3)),
            rng.normal(size=(n % 3, 4)),
        )
        for n in range(start, start + count)
    ]


def same(found: Index, wanted: list[tuple[ShelfEntry, np.ndarray]]) -> None:
    assert found.entries == tuple(entry for entry, _ in wanted)
    vectors = np.concatenate([np.zeros((0, 4)), *(own for _, own in found.blocks() if len(own))])
    np.testing.assert_allclose(vectors, np.concatenate([own for _, own in wanted]), atol=2e-3)  # float16


def test_an_index_is_read_as_it_was_written_over_several_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "SEGMENT", 4)
    index, items = Index.create(tmp_path / "shelf", BASE, "hidden"), entries(11)
    for start in (0, 3, 5):
        index = index.change(items[start : start + (2 if start == 3 else 6 if start else 3)])
    assert [len(part) for part in index.parts] == [4, 4, 3]
    same(index, items)
    same(Index.open(tmp_path / "shelf"), items)
    # One in the middle is replaced, and goes to the end; nothing but the segments in use is left.
    changed = entries(1, 1)
    same(Index.open(tmp_path / "shelf").change(changed), [*items[4:8], items[0], *items[2:4], *items[8:], *changed])
    left = {path.stem for path in (tmp_path / "shelf" / "segments").iterdir()}
    assert left == {f"{number:06d}" for number in Index.open(tmp_path / "shelf").head.segments}


@pytest.mark.parametrize("writes", range(3))
def test_a_change_that_is_stopped_leaves_the_index_as_it_was(tmp_path, monkeypatch, writes):
    items = entries(5)
    index = Index.create(tmp_path / "shelf", BASE, "hidden").change(items[:3])
    real, done = index_module.write_whole, []

    def stop(*arguments, **settings):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(real(*arguments, **settings))

    monkeypatch.setattr(index_module, "write_whole", stop)
    with pytest.raises(KeyboardInterrupt):
        index.change(items[3:])
    monkeypatch.setattr(index_module, "write_whole", real)
    same(Index.open(tmp_path / "shelf"), items[:3])
    same(Index.open(tmp_path / "shelf").change(items[3:]), items)


def test_a_folder_that_holds_something_else_and_a_damaged_index_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds files but no shelf\.json"):
        Index.create(tmp_path, BASE, "hidden")
    with pytest.raises(UsageError, match="is no shelf"):
        Index.open(tmp_path / "nowhere")
    index = Index.create(tmp_path / "shelf", BASE, "hidden").change(entries(3))
    (tmp_path / "shelf" / "segments" / f"{index.head.segments[0]:06d}.json").write_text("[{}]")
    with pytest.raises(UsageError, match="damaged"):
        Index.open(tmp_path / "shelf")


def test_all_adapters_below_a_folder_are_added_and_bad_ones_are_listed(shelf, base, output, tmp_path):
    assert sorted(shelf.names) == ["one/boil", "one/cities", "one/fox"]
    entry = shelf.entry("one/fox")
    assert entry.verified
    (original,) = entry.earlier
    assert (original.adapter, original.base, original.method) == ("original", "from here", "distill")
    assert (entry.samples_from, len(entry.samples), entry.rank, entry.modules) == ("completions", 16, 2, 4)
    found = jcl.Shelf(tmp_path / "again", base).add(output)
    assert sorted(found.added) == sorted(shelf.names)
    reasons = {one.place: one.reason for one in found.refused}
    assert reasons.keys() == {str(output / "other"), str(output / "damaged")}
    assert "of another base by its own record: there" in reasons[str(output / "other")]
    again = jcl.Shelf(tmp_path / "again").add(output)
    assert (again.added, sorted(again.kept)) == ((), sorted(shelf.names))


def test_an_adapter_without_a_record_is_accepted_by_its_shapes_and_said_to_be_so(base, tmp_path):
    write_adapter(tmp_path / "plain", base)
    wide = jcl.open_base(write_base(tmp_path / "wide", 30, hidden=32, head_dim=8, layers=2))
    write_adapter(tmp_path / "of_another", wide)
    shelf = jcl.Shelf(tmp_path / "shelf", base, encoder="none")
    found = shelf.add([tmp_path / "plain", tmp_path / "of_another"])
    assert found.added == ("plain",)
    assert not shelf.entry("plain").verified
    assert "give the base it was trained on" in found.refused[0].reason


def test_what_training_writes_names_its_base(base, tmp_path):
    adapter = random_adapter(base, rank=2, scale=0.1)
    save_trained(adapter, tmp_path / "trained", base, dataclasses.asdict(TrainingSettings()))
    shelf = jcl.Shelf(tmp_path / "shelf", base, encoder="none")
    shelf.add(tmp_path / "trained")
    entry = shelf.entry("trained")
    assert (entry.verified, entry.earlier) == (True, ())
    other = jcl.open_base(write_base(tmp_path / "other", 30, bos=True, layers=2, seed=7))  # of the same shapes
    refused = jcl.Shelf(tmp_path / "others", other, encoder="none").add(tmp_path / "trained").refused
    assert "of another base by its own record" in refused[0].reason


def test_numbers_that_are_not_finite_are_refused(base, tmp_path):
    path = write_adapter(tmp_path / "bad", base) / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = np.nan
    save_file(tensors, path)
    found = jcl.Shelf(tmp_path / "shelf", base, encoder="none").add(tmp_path / "bad")
    assert "NaN or infinite" in found.refused[0].reason


def test_samples_and_a_lift_that_were_given_once_stay(base, tmp_path):
    place = write_adapter(tmp_path / "plain", base)
    (tmp_path / "mine.txt").write_text("\n".join(TASKS["fox"]), encoding="utf-8")
    shelf = jcl.Shelf(tmp_path / "shelf", base, encoder="none")
    shelf.add(place, prompts=tmp_path / "mine.txt", lift=0.8, name="foxes")
    entry = shelf.entry("foxes")
    assert (entry.samples, entry.samples_from, entry.lift) == (tuple(TASKS["fox"]), "mine.txt", 0.8)
    (place / "completions.jsonl").write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")  # of the source
    assert shelf.add(place, name="foxes").kept == ("foxes",)
    write_adapter(tmp_path / "plain2", base, seed=5)
    with pytest.raises(UsageError, match="for 2 adapters"):
        shelf.add([place, tmp_path / "plain2"], name="two")
    refused = shelf.add(tmp_path / "plain2", name="foxes").refused
    assert "is that of" in refused[0].reason


def test_a_stopped_addition_keeps_what_was_read_and_goes_on(base, output, tmp_path, monkeypatch):
    shelf, real = jcl.Shelf(tmp_path / "shelf", base, encoder="none"), adding_module.read_entry
    names = []

    def stop(found, *arguments):
        if len(names) == 2:
            raise KeyboardInterrupt
        names.append(found.name)
        return real(found, *arguments)

    monkeypatch.setattr(adding_module, "read_entry", stop)
    with pytest.raises(KeyboardInterrupt):
        shelf.add(output / "one")
    monkeypatch.setattr(adding_module, "read_entry", real)
    again = jcl.Shelf(tmp_path / "shelf")
    assert list(again.names) == names
    assert again.add(output / "one").kept == tuple(names)
    assert len(again) == 3


def test_another_base_than_the_shelfs_is_refused(shelf, tmp_path):
    other = jcl.open_base(write_base(tmp_path / "other", 30, bos=True, layers=2, seed=7))
    with pytest.raises(UsageError, match="is another base"):
        jcl.Shelf(shelf.folder, other)
    with pytest.raises(UsageError, match="made with the encoder hidden, not none"):
        jcl.Shelf(shelf.folder, encoder="none")


def test_an_adapter_that_has_changed_or_gone_is_noticed(base, tmp_path):
    place = write_adapter(tmp_path / "one", base)
    shelf = jcl.Shelf(tmp_path / "shelf", base, encoder="none")
    shelf.add(place)
    assert shelf.load("one").modules.keys() == jcl.load_adapter(place).modules.keys()
    assert not shelf.missing(shelf.entry("one"))
    for path in place.iterdir():
        path.unlink()
    place.rmdir()
    assert shelf.missing(shelf.entry("one"))
    write_adapter(place, base, seed=9)
    with pytest.raises(UsageError, match="has changed since"):
        shelf.load("one")


def test_the_command_adds_lists_shows_and_searches(base, output, tmp_path, capsys):
    folder = str(tmp_path / "shelf")
    main(["shelf", "add", folder, str(output), "--base", str(base.path)])
    printed = capsys.readouterr().out
    assert "added: one/fox (16 samples from completions)" in printed
    assert "not added: " + str(output / "damaged") in printed
    main(["shelf", "list", folder])
    assert "one/cities" in capsys.readouterr().out
    main(["shelf", "list", folder, "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert {one["name"]: one["samples"] for one in listed["adapters"]} == {f"one/{task}": 16 for task in TASKS}
    main(["shelf", "show", folder, "one/fox"])
    line = f"line: original of from here, moved to {jcl.Shelf(folder).info.name} by distill"
    assert line in capsys.readouterr().out
    asked = ["Water boils at 100 degrees", "§§§ ???"]
    main(["shelf", "search", folder, *asked, "--by", "tfidf", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [[one["adapter"] for one in each["adapters"]] for each in found] == [["one/boil"], []]
    main(["shelf", "search", folder, *asked, "--by", "tfidf"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("one/boil (")
    assert lines[1] == "none: §§§ ???"
    with pytest.raises(SystemExit) as stopped:
        main(["shelf", "add", folder, str(output / "damaged")])
    assert stopped.value.code == 2
    assert "damaged: not added" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["missing", "empty"])
def test_nothing_is_left_of_a_new_shelf_to_which_nothing_could_be_added(base, tmp_path, capsys, named):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["shelf", "add", str(tmp_path / "shelf"), str(tmp_path / named), "--base", str(base.path)])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "shelf").exists()


def test_adapters_of_one_sample_each_are_added_and_searched(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("Water boils at 100 degrees\n")
    shelf = jcl.Shelf(tmp_path / "shelf", base)
    for name in "ab":
        shelf.add(write_adapter(tmp_path / name, base), prompts=tmp_path / "prompts.txt")
    assert shelf.search(["Water boils", "Where?"]).scores.shape == (2, 2)
