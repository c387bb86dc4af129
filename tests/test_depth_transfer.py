"""`--depth similar` from file to file on tiny bases with two different tokenizers."""

import json

import pytest
from command_line import main
from probe_bases import CORPUS, write_base
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora import Probes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "source", 60, seed=0, layers=4)
    write_base(folder / "target", 20, bos=True, seed=1, hidden=56, head_dim=14, layers=2)
    jcl.save_adapter(random_adapter(jcl.open_base(folder / "source")), folder / "adapter")
    (folder / "texts.txt").write_text("\n".join(CORPUS))
    return folder


@pytest.mark.full
def test_similar_depth_by_the_command_and_again_by_its_recipe(files, tmp_path, capsys):
    given = [files / "adapter", "--source", files / "source", "--target", files / "target", "--out", tmp_path / "one"]
    flags = ["--method", "pad-truncate", "--depth", "similar", "--prompts", files / "texts.txt"]
    main(["transfer", *map(str, given), *map(str, flags)])
    printed = capsys.readouterr().out
    assert "pad-truncate, depth similar" in printed
    assert f"probes: {len(CORPUS)} texts read from" in printed
    report = json.loads((tmp_path / "one" / "transfer_report.json").read_text())
    assert report["recipe"]["depth"] == "similar"
    assert 0 <= report["layers"][0] < report["layers"][1] < 4
    assert {(row["target"].split(".")[2], row["source"].split(".")[2]) for row in report["rows"]} == {
        (str(place), str(layer)) for place, layer in enumerate(report["layers"])
    }
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(report["recipe_toml"])
    paths = [*given[:-1], tmp_path / "two", "--prompts", files / "texts.txt"]
    main(["transfer", "--recipe", str(recipe), *map(str, paths)])
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_equal_bases_are_paired_layer_by_layer_and_the_transport_says_so(files):
    base = jcl.open_base(files / "source")
    transport = jcl.align(base, base, method="copy", depth="similar", probes=Probes(tuple(CORPUS), "given"))
    assert transport.pairing.depth_map == "similar"
    assert transport.pairing.layers == (0, 1, 2, 3)
    assert "matched positions" in transport.recipe.probes
