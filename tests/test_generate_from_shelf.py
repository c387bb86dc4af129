"""`jcrosslora generate --shelf`: each prompt is answered by the adapter whose task it is of, or by the base alone."""

import json
import shutil

import numpy as np
import pytest
from command_line import main
from probe_bases import chat_base, write_base
from shelf_adapters import TASKS, write_adapter, write_tasks

import jcrosslora as jcl
from jcrosslora.text import COMPLETIONS, Completion, Message, completion_lines
from jcrosslora.text.reading import PLAIN_TEMPLATE

FOX, BOIL, OTHER = TASKS["fox"][3], TASKS["boil"][3], "Peter and Anna"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    base = chat_base(folder / "base")
    jcl.Shelf(folder / "shelf", base).add(write_tasks(folder / "out", base))
    return folder


def test_each_prompt_is_answered_by_its_own_adapter(files):
    shelf = jcl.Shelf(files / "shelf")
    composed, weights = shelf.compose([FOX, BOIL, OTHER])
    assert sorted(composed.names) == ["boil", "fox"]
    np.testing.assert_array_equal(weights[2], [0, 0])
    assert [composed.names[place] for place in weights[:2].argmax(axis=1)] == ["fox", "boil"]
    written = composed.generate([FOX, BOIL, OTHER], weights=weights, max_new_tokens=6)
    for prompt, name, text in zip([FOX, BOIL], ["fox", "boil"], written, strict=False):
        assert text == jcl.compose(files / "base", [files / "out" / name]).generate([prompt], max_new_tokens=6)[0]
    assert written[2] != composed.generate([OTHER], max_new_tokens=6)[0]


def test_where_no_adapter_suits_the_base_writes_alone(files):
    composed, weights = jcl.Shelf(files / "shelf").compose([OTHER])
    assert not weights.any()
    assert composed.generate(OTHER, weights=weights, max_new_tokens=6) == composed.generate(
        [OTHER], weights=[0], max_new_tokens=6
    )


def test_the_command_says_which_adapter_each_prompt_gets(files, capsys):
    main(["generate", "--shelf", str(files / "shelf"), "--max-new-tokens", "4", "--json", FOX, OTHER])
    printed = capsys.readouterr()
    assert f"note: fox: {FOX}\n" in printed.err
    assert f"note: the base alone: {OTHER}\n" in printed.err
    assert [one["prompt"] for one in json.loads(printed.out)] == [FOX, OTHER]


def test_a_prompt_is_asked_as_the_samples_of_its_adapter_are(tmp_path, capsys):
    base = jcl.open_base(write_base(tmp_path / "base", 60, layers=2))  # which has no chat template
    write_adapter(tmp_path / "fox", base, digest=base.digest(), texts=TASKS["fox"])
    shelf = jcl.Shelf(tmp_path / "shelf", base)
    shelf.add(tmp_path / "fox")
    composed, weights = shelf.compose([FOX])
    assert weights.all()
    asked = composed.generate([(Message("user", FOX),)], max_new_tokens=6)
    assert asked != composed.generate([FOX], max_new_tokens=6)
    main(["generate", "--shelf", str(tmp_path / "shelf"), "--max-new-tokens", "6", FOX])
    assert capsys.readouterr().out == f"{asked[0]}\n"


def test_an_adapter_that_was_fitted_to_another_chat_template_is_named(files, tmp_path):
    shutil.copytree(files / "out" / "fox", tmp_path / "fox")
    template = (files / "base" / "chat_template.jinja").read_text()
    for text, noted in ((template, 0), (template + "\n{# another #}", 1)):
        (tmp_path / "fox" / "chat_template.jinja").write_text(text)
        assert len(jcl.compose(files / "base", [tmp_path / "fox"]).other_templates()) == noted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "a"], "--adapter was given with the shelf"),
        (["--weights", "1"], "--weights was given with the shelf"),
        (["--compose", "router2"], "composition 'router2' is unknown (did you mean 'router'?)"),
        (["--compose", "ties"], "write one adapter with peft's add_weighted_adapter"),
        (["--compose", "."], ".: brings its adapters"),
        (["--template", "a.jinja"], "give the shelf's base with --base"),
        (["--top", "0"], "expected 1 or more"),
    ],
)
def test_bad_input_is_one_line(files, capsys, flags, message):
    with pytest.raises(SystemExit) as found:
        main(["generate", "--shelf", str(files / "shelf"), *flags, "x"])
    assert found.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_without_base_and_shelf_one_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "x"])
    assert "no base was given" in capsys.readouterr().err


def test_a_flag_that_needs_a_shelf_is_refused_without_one(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--base", "nowhere", "--top", "2", "x"])
    assert "top 2 was given and no shelf" in capsys.readouterr().err


def test_an_adapter_that_was_moved_with_plain_texts_is_asked_in_plain_text(tmp_path, capsys):
    base = chat_base(tmp_path / "base")
    write_adapter(tmp_path / "fox", base, digest=base.digest(), texts=TASKS["fox"])
    lines = completion_lines([Completion(text, " Anna") for text in TASKS["fox"]])
    (tmp_path / "fox" / COMPLETIONS).write_text(lines)
    jcl.Shelf(tmp_path / "shelf", base).add(tmp_path / "fox")
    said = []
    for place in (["--shelf", tmp_path / "shelf"], ["--base", tmp_path / "base", "--adapter", tmp_path / "fox"]):
        main(["generate", *map(str, place), "--max-new-tokens", "6", FOX])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_select_runs_the_best_of_several_adapters(files):
    shelf, prompts = jcl.Shelf(files / "shelf"), [FOX, BOIL]
    one, two = (shelf.compose(prompts, "select", top=top) for top in (1, 3))
    assert one[0].names == two[0].names
    np.testing.assert_array_equal(one[1], two[1])


def test_a_prompt_without_a_token_and_one_that_is_cut_are_told(tmp_path, capsys):
    write_base(tmp_path / "base", 60, layers=1)
    write_adapter(tmp_path / "a", jcl.open_base(tmp_path / "base"))
    places = ["--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "a"), "--max-new-tokens", "1"]
    with pytest.raises(SystemExit) as found:
        main(["generate", *places, ""])
    assert found.value.code == 2
    assert "a prompt has no token" in capsys.readouterr().err
    main(["generate", *places, "Anna " * 3000, "Anna"])
    assert "note: 1 of 2 prompts are cut to their last 2,048 tokens" in capsys.readouterr().err


def test_an_adapter_with_a_chat_template_is_asked_in_it_on_a_base_that_has_none(tmp_path, capsys):
    base = jcl.open_base(write_base(tmp_path / "base", 60, layers=2))
    folder, said = write_adapter(tmp_path / "a", base), []
    places = ["--base", base.ref, "--adapter", str(folder), "--max-new-tokens", "6"]
    (folder / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    for chat in ("auto", "always", "never"):
        main(["generate", *map(str, places), "--chat", chat, FOX])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
