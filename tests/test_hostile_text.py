"""Texts of files that somebody else wrote: names, keys, templates. They are shown, and nothing in them acts."""

import json
import shutil
import tomllib
import unicodedata

import numpy as np
import pytest
from adapter_folders import write_folder
from command_line import main
from gguf_files import small_llama
from markdown_it import MarkdownIt
from safetensors.numpy import load_file
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl

# It colours the terminal, sets its title, turns the text around, loads an image, runs a script, makes a link, a code
# block and a cell of a table, ends a tag of markup, and is an emoji's name.
ACTING = (
    "\x1b[31mred\x1b]0;t\x07\x9b1m\r\u202e\u2066<img src=x><script>alert(1)<script>![p](u)[l](u) | ``` :smile: [/x]"
)
HOSTILE = f"{ACTING}\n# forged: line\u2028"
SHOWN = ACTING.translate({ord(one): ascii(one)[1:-1] for one in "\x1b\x07\x9b\r\u202e\u2066"})
P = "base_model.model."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Bases and an adapter whose names, keys and tensors are hostile."""
    folder = tmp_path_factory.mktemp("made")
    source = write_llama(folder / f"s {ACTING}", seed=0, layers=1)
    target = write_llama(folder / f"t {ACTING}", seed=1, layers=1, hidden=56, head_dim=14)
    jcl.save_adapter(random_adapter(jcl.open_base(source)), folder / "plain")
    tensors = load_file(folder / "plain" / "adapter_model.safetensors")
    tensors |= {f"{P}vision_tower.{HOSTILE}.lora_{side}.weight": np.ones((2, 2), np.float32) for side in ("A", "B")}
    config = json.loads((folder / "plain" / "adapter_config.json").read_text())
    named = {"base_model_name_or_path": HOSTILE.replace("/", ""), HOSTILE: HOSTILE}  # a path's last part is its name
    adapter = write_folder(folder / f"a {ACTING}", config | named, tensors)
    return source, target, adapter


def printed(capsys) -> str:
    """Return what a command printed on both streams, and check that nothing in it acts on a terminal."""
    found = "".join(capsys.readouterr())
    acting = {one for one in found if one != "\n" and unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")}
    turning = {one for one in found if unicodedata.bidirectional(one) in ("RLO", "LRI")}
    assert (acting, turning) == (set(), set())
    assert "\n# forged" not in found
    return found


def transfer(made, out, *flags):
    source, target, adapter = made
    given = [adapter, "--source", source, "--target", target, "--out", out, "--method", "cross-lora"]
    return [*map(str, ["transfer", *given]), "--no-cache", *flags]


def test_names_are_shown_on_the_terminal_and_do_nothing(made, tmp_path, capsys):
    source, target, adapter = map(str, made)
    main(["inspect", adapter])
    found = printed(capsys)
    assert f"adapter: {adapter.replace(ACTING, SHOWN)} (" in found
    assert f"for: {SHOWN.replace('/', '')}" in found
    main(["inspect", source])
    assert SHOWN in printed(capsys)
    main(["compare", source, target])
    main(["check", adapter, "--base", source])
    main(["methods"])
    printed(capsys)
    main(transfer(made, tmp_path / "out", "--table", "module"))
    assert "verdict" in printed(capsys)
    main(["merge", source, adapter, "--out", str(tmp_path / f"m {ACTING}")])
    assert f"written: {tmp_path}/m {SHOWN}" in printed(capsys)


def test_names_of_a_gguf_file_are_shown_too(tmp_path, capsys):
    small_llama(tmp_path / "x.gguf", metadata={"general.name": HOSTILE})
    main(["inspect", str(tmp_path / "x.gguf")])
    assert SHOWN in printed(capsys)


def test_errors_quote_files_in_one_line_that_does_nothing(made, tmp_path, capsys):
    source, target, _ = made
    base = shutil.copytree(source, tmp_path / f"b {ACTING}")
    config = json.loads((base / "config.json").read_text())
    spoilt = ({HOSTILE: 1}, {"model_type": HOSTILE}, {"rope_scaling": {"type": HOSTILE}}, {"hidden_act": HOSTILE})
    for changes in spoilt:
        (base / "config.json").write_text(json.dumps(config | changes))
        # What does not change the weights alone is met where the base runs.
        command = ["compare", str(base), str(target)]
        if "model_type" not in changes and HOSTILE not in changes:
            command = ["generate", "x", "--base", str(base)]
        with pytest.raises(SystemExit):
            main(command)
        assert printed(capsys).count("\n") == 1
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / HOSTILE)])
    assert printed(capsys).count("\n") == 1


def test_a_card_shows_names_and_makes_nothing_of_them(made, tmp_path):
    name = HOSTILE.replace("/", "")  # what looks like a path is shortened
    source, target, adapter = made
    named = jcl.open_base(target, name=name)
    out = jcl.transfer(adapter, source, named, "cross-lora", cache=False).save(tmp_path / name)
    card = (out / "README.md").read_text(encoding="utf-8")
    body = card.split("\n---\n", 1)[1]
    tokens = list(MarkdownIt("commonmark").enable("table").parse(body))
    kinds = [token.type for token in tokens] + [one.type for token in tokens for one in token.children or ()]
    assert not {"html_inline", "html_block", "image", "link_open", "code_block"} & set(kinds)
    assert kinds.count("fence") == 3  # how to use it, the recipe, and the command that runs it again
    texts = ["".join(one.content for one in token.children or ()) for token in tokens]
    assert any(SHOWN.replace("\\r", " ") in text for text in texts)  # as it is, once the Markdown is read
    rows = "".join({"tr_open": "\n", "th_open": "|", "td_open": "|"}.get(token.type, "") for token in tokens).split()
    assert set(map(len, rows[:3])) == {4}  # the two bases
    assert not any(unicodedata.category(one) in ("Cc", "Zl") for one in card if one != "\n")
    recipe = tomllib.loads((out / "recipe.toml").read_text(encoding="utf-8"))
    assert recipe["out"] == name


def test_a_notebook_shows_names_and_makes_nothing_of_them(made):
    source, target, adapter = made
    page = jcl.transfer(str(adapter), source=str(source), target=str(target), method="cross-lora")._repr_html_()
    assert "<img" not in page
    assert "<script" not in page
    assert "&lt;img src=x&gt;" in page
    assert not any(unicodedata.category(one) == "Cc" for one in page if one not in "\n\t")
