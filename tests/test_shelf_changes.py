"""A shelf whose adapters move, change or go, and which several processes or stopped ones have worked on."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from command_line import main
from probe_bases import chat_base
from safetensors.numpy import save_file
from shelf_adapters import TASKS, write_adapter
from test_shelf import BASE, entries, same

import jcrosslora as jcl
from jcrosslora.errors import AdapterError, CheckpointError, OutputError, UsageError
from jcrosslora.shelf import Index
from jcrosslora.text import Message
from jcrosslora.utils.unfinished import locked

FOX = TASKS["fox"][0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def shelf(base, tmp_path):
    return jcl.Shelf(tmp_path / "shelf", base, encoder="none")


def test_changes_of_two_processes_both_stay(tmp_path):
    first = Index.create(tmp_path / "shelf", BASE, "hidden").change(entries(3))
    second = Index.open(tmp_path / "shelf").change(entries(2, 3), ["a1"])
    third = first.change(entries(1, 5))
    assert [entry.name for entry in third.entries] == ["a0", "a2", "a3", "a4", "a5"]
    same(Index.open(tmp_path / "shelf"), [*entries(3)[::2], *entries(2, 3), *entries(1, 5)])
    with pytest.raises(UsageError, match="since it was opened: open it again"):
        list(second.blocks())


TOGETHER = """
import sys, time
from pathlib import Path
from jcrosslora.cli.main import main
from jcrosslora.shelf import Index
meeting, own, *arguments = sys.argv[1:]
change = Index.change
def together(*given):
    made = change(*given)
    Path(meeting, own).touch()
    while len(list(Path(meeting).iterdir())) < 2:
        time.sleep(0.01)
    return made
Index.change = together
main(arguments)
"""


@pytest.mark.full
def test_two_processes_that_add_at_the_same_time_both_succeed(base, tmp_path):
    meeting, folder = tmp_path / "meeting", tmp_path / "shelf"
    meeting.mkdir()
    running = []
    for seed, task in enumerate(("fox", "boil")):
        write_adapter(tmp_path / task, base, seed=seed, texts=TASKS[task])
        command = ["shelf", "add", str(folder), str(tmp_path / task), "--base", str(base.path)]
        command = [sys.executable, "-c", TOGETHER, str(meeting), task, *command]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ends = [one.communicate(timeout=120) for one in running]
    assert [one.returncode for one in running] == [0, 0], ends
    assert sorted(jcl.Shelf(folder, base).names) == ["boil", "fox"]
    assert [found[0][0] for found in jcl.Shelf(folder, base).search([FOX]).best()] == ["fox"]


def test_a_search_reads_what_another_process_has_changed(base, tmp_path):
    shelf = jcl.Shelf(tmp_path / "shelf", base)
    shelf.add(write_adapter(tmp_path / "boil", base, texts=TASKS["boil"]))
    other = jcl.Shelf(tmp_path / "shelf", base)
    other.add(write_adapter(tmp_path / "fox", base, seed=1, texts=TASKS["fox"]))
    assert [found[0][0] for found in shelf.search([FOX]).best()] == ["fox"]


def test_a_shelf_that_another_process_has_made_meanwhile_is_opened(base, tmp_path):
    jcl.Shelf(tmp_path / "shelf", base).add(write_adapter(tmp_path / "fox", base, texts=TASKS["fox"]))
    assert Index.create(tmp_path / "shelf", BASE, "hidden").entries[0].name == "fox"


def test_another_adapter_of_the_same_name_is_not_replaced_unseen(tmp_path):
    first = Index.create(tmp_path / "shelf", BASE, "hidden")
    Index.open(tmp_path / "shelf").change(entries(1))
    ((entry, vectors),) = entries(1)
    with pytest.raises(OutputError, match="another process has put another adapter 'a0' on the shelf"):
        first.change([(dataclasses.replace(entry, place="elsewhere"), vectors)])
    shutil.rmtree(tmp_path / "shelf")
    Index.create(tmp_path / "shelf", BASE, "none")
    with pytest.raises(OutputError, match="put another shelf there"):
        first.change(entries(1))


def test_a_change_waits_for_another(tmp_path):
    index = Index.create(tmp_path / "shelf", BASE, "hidden")
    changing = threading.Thread(target=index.change, args=(entries(1),))
    with locked(tmp_path / "shelf" / "segments"):
        changing.start()
        changing.join(0.2)
        assert changing.is_alive()
        assert Index.open(tmp_path / "shelf").entries == ()
    changing.join()
    assert len(Index.open(tmp_path / "shelf").entries) == 1


def test_what_killed_processes_left_is_no_obstacle(tmp_path):
    folder = tmp_path / "shelf"
    (folder / "segments").mkdir(parents=True)
    (folder / ".shelf.json.0a.tmp").write_text("half")
    (folder / "segments" / ".000001.json.0a.tmp").write_text("half")
    (folder / "segments" / "000001.safetensors").write_text("of no head")
    same(Index.create(folder, BASE, "hidden").change(entries(2)), entries(2))
    assert sorted(path.name for path in (folder / "segments").iterdir()) == ["000001.json", "000001.safetensors"]


def test_adapters_are_taken_off_and_put_back(base, tmp_path, capsys):
    folder = tmp_path / "shelf"
    shelf = jcl.Shelf(folder, base)
    shelf.add([write_adapter(tmp_path / task, base, seed=seed, texts=TASKS[task]) for seed, task in enumerate(TASKS)])
    main(["shelf", "remove", str(folder), "fox", "boil"])
    assert capsys.readouterr().out.startswith("removed: fox\nremoved: boil\n")
    shelf = jcl.Shelf(folder, base)
    assert shelf.names == ("cities",)
    with pytest.raises(UsageError, match="has no adapter 'fox'"):
        shelf.remove(["cities", "fox"])
    shelf.remove("cities")
    assert (len(shelf), len(jcl.Shelf(folder))) == (0, 0)
    shelf.add(tmp_path / "fox")
    assert [found[0][0] for found in shelf.search([FOX]).best()] == ["fox"]


def test_an_addition_that_is_interrupted_says_what_stays(shelf, base, tmp_path, monkeypatch, capsys):
    def stop(*_arguments, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(jcl.Shelf, "add", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["shelf", "add", str(shelf.folder), str(write_adapter(tmp_path / "one", base))])
    assert stopped.value.code == 130
    assert "interrupted; what was added stays" in capsys.readouterr().err


def test_a_base_that_has_moved_is_asked_for(base, tmp_path):
    shutil.copytree(base.path, tmp_path / "base")
    jcl.Shelf(tmp_path / "shelf", tmp_path / "base", encoder="none")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is not there: give its place with --base"):
        jcl.Shelf(tmp_path / "shelf").add(write_adapter(tmp_path / "one", base))
    assert jcl.Shelf(tmp_path / "shelf", tmp_path / "elsewhere").add(tmp_path / "one").added == ("one",)


def test_an_addition_of_nothing_is_an_error(shelf, capsys):
    with pytest.raises(SystemExit):
        main(["shelf", "add", str(shelf.folder)])
    assert "no adapter was given" in capsys.readouterr().err


def test_a_newer_format_is_named(shelf):
    (shelf.folder / "shelf.json").write_text(json.dumps({"format": 2, "version": "9.0", "what": "is new"}))
    with pytest.raises(UsageError, match=r"format 2, expected format 1.*\(9\.0\)"):
        jcl.Shelf(shelf.folder)


def test_another_scale_in_the_configuration_is_noticed(shelf, base, tmp_path):
    place = write_adapter(tmp_path / "one", base)
    shelf.add(place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4 * config["lora_alpha"]}))
    with pytest.raises(UsageError, match="has changed since"):
        shelf.load("one")
    assert shelf.add(place).added == ("one",)
    assert shelf.load("one").modules


def test_an_adapter_that_has_moved_is_added_where_it_is(shelf, base, tmp_path):
    shelf.add(write_adapter(tmp_path / "old" / "one", base), lift=0.5)
    shutil.move(tmp_path / "old", tmp_path / "new")
    with pytest.raises(AdapterError, match="the adapter 'one' of the shelf is not there"):
        shelf.load("one")
    assert shelf.add(tmp_path / "new" / "one").added == ("one",)
    assert shelf.load("one").modules
    assert shelf.entry("one").lift == 0.5


def test_an_adapter_below_the_shelf_is_no_hub_id_when_it_is_gone(shelf, base):
    place = write_adapter(shelf.folder / "own" / "one", base)
    shelf.add(place)
    shutil.rmtree(place)
    assert shelf.missing(shelf.entry("one"))


def test_the_base_answers_alone_though_an_adapter_is_gone(base, tmp_path):
    shelf = jcl.Shelf(tmp_path / "shelf", base, encoder="none")
    shelf.add([write_adapter(tmp_path / task, base, texts=TASKS[task]) for task in ("boil", "fox")])
    shutil.rmtree(tmp_path / "boil")
    composed, weights = shelf.compose(["§"])
    assert (composed.names, weights.tolist()) == (("fox",), [[0]])


def test_a_link_that_leads_back_is_followed_once(shelf, base, tmp_path):
    write_adapter(tmp_path / "out" / "one", base)
    (tmp_path / "out" / "again").symlink_to(tmp_path / "out")
    assert shelf.add(tmp_path / "out").added == ("one",)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"two\nlines"])
def test_a_name_that_cannot_be_shown_is_refused(base, tmp_path, capsysbinary, name):
    write_adapter(tmp_path / "out" / "one", base)
    os.rename(tmp_path / "out" / "one", os.fsencode(tmp_path / "out") + b"/" + name)
    main(["shelf", "add", str(tmp_path / "shelf"), str(tmp_path / "out"), "--base", str(base.path), "--encoder=none"])
    assert b"has characters that cannot be shown: give another with --name" in capsysbinary.readouterr().out


def test_a_lift_that_is_no_number_is_refused(shelf, base, tmp_path):
    with pytest.raises(UsageError, match="lift nan"):
        shelf.add(write_adapter(tmp_path / "one", base), lift=float("nan"))


def test_a_search_by_words_without_samples_is_an_error(shelf, base, tmp_path):
    shelf.add(write_adapter(tmp_path / "one", base))
    with pytest.raises(UsageError, match="no adapter has samples"):
        shelf.search(["x"])


def test_weight_probes_of_another_form_are_none(base, tmp_path):
    shelf = jcl.Shelf(tmp_path / "shelf", base)
    shelf.add(write_adapter(tmp_path / "one", base))
    save_file({"other": np.zeros(2, np.float32)}, shelf.folder / "weights.safetensors")
    with pytest.raises(UsageError, match="has no trained weight probes"):
        shelf.search(["x"], "weights")


def test_prompts_are_texts_or_messages_one_or_several(shelf, base, tmp_path):
    shelf.add(write_adapter(tmp_path / "fox", base, texts=TASKS["fox"]))
    wanted = shelf.search(FOX).scores
    for one in ([{"role": "user", "content": FOX}], (Message("user", FOX),), [FOX], [[Message("user", FOX)]]):
        np.testing.assert_array_equal(shelf.search(one).scores, wanted)
