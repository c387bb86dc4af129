"""What an adapter was moved from: recorded in its files, shown on a shelf, and warned about in the next move."""

import json

import pytest
from command_line import main
from probe_bases import write_base, write_move

import jcrosslora as jcl


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """An adapter, moved to a second base and from there to a third, and its bases."""
    folder = tmp_path_factory.mktemp("line")
    adapter, source, target = write_move(folder)
    third = write_base(folder / "third", 60, layers=2, seed=2)
    jcl.transfer(adapter, source, target, "pad-truncate", cache=False).save(folder / "second-adapter")
    again = jcl.transfer(folder / "second-adapter", target, third, "random", cache=False)
    again.save(folder / "third-adapter")
    return folder, again.report


def test_each_move_records_the_moves_before_it(moved):
    folder, report = moved
    original, second, third = (
        jcl.load_adapter(folder / name) for name in ("adapter", "second-adapter", "third-adapter")
    )
    assert original.info.earlier == ()
    first, last = third.info.earlier
    assert second.info.earlier == (first,)
    assert (first.adapter, first.digest, first.method) == ("adapter", original.info.digest, "pad-truncate")
    assert (last.adapter, last.digest, last.method) == ("second-adapter", second.info.digest, "random")
    assert last.base_digest == jcl.open_base(folder / "target").digest()
    assert report.adapter.earlier == (first,)


def test_a_move_of_a_moved_adapter_names_the_original(moved, tmp_path, capsys):
    folder, report = moved
    digest = jcl.load_adapter(folder / "adapter").info.digest
    (said,) = [text for text in report.warnings if "itself moved" in text]
    assert f"move the original adapter instead ({digest})" in said
    assert "by pad-truncate" in said
    given = ["transfer", folder / "second-adapter", "--source", folder / "target", "--target", folder / "third"]
    main([*map(str, given), "--out", str(tmp_path / "out"), "--method", "random", "--dry-run"])
    assert "move the original adapter instead" in " ".join(capsys.readouterr().out.split())
    first = jcl.transfer(folder / "adapter", folder / "source", folder / "third", "random", cache=False).report
    assert not [text for text in first.warnings if "itself moved" in text]


def test_a_shelf_shows_the_line(moved, tmp_path, capsys):
    folder, _ = moved
    shelf = jcl.Shelf(tmp_path / "shelf", folder / "third", encoder="none")
    shelf.add(folder / "third-adapter", lift=0.8)
    original, second = jcl.Shelf(tmp_path / "shelf").entry("third-adapter").earlier
    main(["shelf", "show", str(tmp_path / "shelf"), "third-adapter"])
    shown = " ".join(capsys.readouterr().out.split())
    moves = f"moved to {second.base} by pad-truncate, moved to {shelf.info.name} by random"
    assert f"line: adapter of {original.base}, {moves}; original {original.digest}" in shown
    assert "lift: 0.80" in shown
    main(["shelf", "show", str(tmp_path / "shelf"), "third-adapter", "--json"])
    assert [one["adapter"] for one in json.loads(capsys.readouterr().out)["earlier"]] == ["adapter", "second-adapter"]


@pytest.mark.parametrize("damage", ["{", '{"recipe": 1}', '{"recipe": {"method": 2}, "adapter": {"earlier": [3]}}'])
def test_a_damaged_record_tells_nothing(moved, tmp_path, damage):
    folder, _ = moved
    for path in (folder / "adapter").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "transfer_report.json").write_text(damage)
    assert not any(one.adapter or one.method for one in jcl.load_adapter(tmp_path).info.earlier)
