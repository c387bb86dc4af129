"""Recipes: what a file of somebody else's may decide, and the command that repeats a transfer."""

import dataclasses
import json
import re
import shlex
import shutil
import threading
import tomllib
from html import unescape
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
from probe_bases import write_base
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.cli.main import main

WEIGHTS = "adapter_model.safetensors"
SERVED = 'source_model = "m"\nsource_tokenizer = "source"\ntarget = "target"\nout = "moved"\n'
NAMED = 'adapter = "mine"\nsource = "source"\ntarget = "target"\nout = "moved"\nmethod = "copy"\n'


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Two bases of equal shapes, an adapter of the first, prompts, and two templates."""
    house = tmp_path_factory.mktemp("house")
    for seed, name in enumerate(("source", "target")):
        write_base(house / name, 30, bos=True, eos=1, layers=2, seed=seed)
    adapter = random_adapter(jcl.open_base(house / "source"), scale=0.5)
    jcl.save_adapter(adapter, house / "mine", base_name="org/source")
    (house / "my prompts.txt").write_text("one fox\ntwo dogs\nthree cats\n")
    for name in ("source", "target"):
        (house / f"{name}.jinja").write_text("{{ messages[0]['content'] }}")
    return house


@pytest.fixture
def here(house, tmp_path, monkeypatch):
    """The current folder, with copies of the files."""
    shutil.copytree(house, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """A server that notes each request's path and key; the user has a key."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_error(404)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
        server.shutdown()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["done", "dry-run"])
def test_a_key_goes_to_no_address_of_a_recipe(here, asked, dry, capsys):
    url, seen = asked
    Path("r.toml").write_text(f'source_url = "{url}"\n{SERVED}')
    said = refused(capsys, "transfer", "--recipe", "r.toml", *dry)
    assert "recipe r.toml sets source_url" in said
    assert "add --source-url URL" in said
    assert seen == []
    # Nor without the address; typed, it gets the key.
    Path("r.toml").write_text(SERVED)
    assert "give its address with --source-url" in refused(capsys, "transfer", "--recipe", "r.toml", *dry)
    refused(capsys, "transfer", "--recipe", "r.toml", "--source-url", url, *dry)
    assert seen[0] == ("/v1/models", "Bearer sk-secret")


def test_a_key_goes_to_no_address_of_a_plan(here, asked, capsys):
    url, seen = asked
    plan = 'out = "moved"\nbases = { s = "source", t = "target" }\nadapters = { s = "mine" }\n'
    plan += f'[[moves]]\nfrom = "s"\nto = "t"\nsource_url = "{url}"\nsource_model = "m"\nsource_tokenizer = "source"\n'
    Path("plan.toml").write_text(plan)
    assert "sets source_url" in refused(capsys, "batch", "plan.toml", "--dry-run")
    Path("plan.toml").write_text(plan.partition("source_url")[0] + "overwrite = true\n")
    assert "sets overwrite, which no file may do: leave it out there, and add --overwrite" in refused(
        capsys, "batch", "plan.toml", "--dry-run"
    )
    assert seen == []


@pytest.mark.parametrize("more", ["", "overwrite = true\n", "overwrite = false\n"])
def test_a_recipe_replaces_nothing(here, more, capsys):
    jcl.save_adapter(random_adapter(jcl.open_base("source")), "precious", base_name="org/source")
    before = Path("precious", WEIGHTS).read_bytes()
    for out in ("precious", str(here / "precious"), "../elsewhere", "sub/new", "~/new", "..", "C:\\new"):
        Path("r.toml").write_text(f"{more}{NAMED}".replace('"moved"', json.dumps(out)))
        said = refused(capsys, "transfer", "--recipe", "r.toml", "--no-cache")
        assert ("sets overwrite" in said) == bool(more)
        assert ("sets out to" in said) == (not more and out != "precious")
    # With --overwrite alone it would choose what is replaced.
    if not more:
        Path("r.toml").write_text(NAMED.replace("moved", "precious"))
        assert "--out" in refused(capsys, "transfer", "--recipe", "r.toml", "--no-cache", "--overwrite")
    assert Path("precious", WEIGHTS).read_bytes() == before
    assert {path.name for path in here.iterdir()} & {"elsewhere", "sub", "new"} == set()


def with_value(name, value):
    """A recipe with one value."""
    return "".join(f"{key} = {json.dumps(one)}\n" for key, one in (tomllib.loads(NAMED) | {name: value}).items())


@pytest.mark.parametrize(
    "name",
    [
        *("adapter", "source", "source_tokenizer", "source_template", "target", "target_template"),
        *("prompts", "examples"),
    ],
)
def test_a_recipe_names_files_without_their_folders(here, name, capsys):
    flag = "ADAPTER" if name == "adapter" else f"--{name.replace('_', '-')}"
    for path in (str(here / "target"), "../target"):
        Path("r.toml").write_text(with_value(name, path))
        said = refused(capsys, "transfer", "--recipe", "r.toml", "--dry-run")
        assert f"recipe r.toml sets {name} to {path!r}; it must be a name without a folder" in said
        assert f"add {flag} to the command" in said


@pytest.mark.parametrize("path", ["./prompts", "~", "~/prompts", "a/b", "a/b/c", ".", "..", "", "a\\b", "C:\\prompts"])
def test_paths_in_a_recipe(here, path, capsys):
    Path("r.toml").write_text(with_value("prompts", path))
    # A path that is typed as well does not make the recipe good.
    said = refused(capsys, "transfer", "--recipe", "r.toml", "--prompts", "my prompts.txt", "--dry-run")
    assert "recipe r.toml sets prompts to " in said


def test_files_are_found_beside_the_recipe_and_in_the_current_folder(here, capsys):
    (here / "theirs").mkdir()
    (here / "mine").rename(here / "theirs" / "mine")
    Path("theirs/r.toml").write_text(NAMED)
    main(["transfer", "--recipe", "theirs/r.toml", "--table", "none", "--no-cache"])
    capsys.readouterr()
    assert Path("moved", WEIGHTS).exists()  # as older recipes have it: in the current folder
    assert "exists already" in refused(capsys, "transfer", "--recipe", "theirs/r.toml", "--no-cache")


def test_a_link_beside_a_recipe_leads_nowhere_else(here, tmp_path_factory, capsys):
    """An archive may hold a link to a file of its reader, which would be read, and sent to the server that is typed."""
    secret = tmp_path_factory.mktemp("secret") / "key.txt"
    secret.write_text("a key\nof mine\n")
    Path("theirs").mkdir()
    Path("theirs/notes.txt").symlink_to(secret)
    Path("theirs/r.toml").write_text(f'{NAMED}prompts = "notes.txt"\n')
    said = refused(capsys, "transfer", "--recipe", "theirs/r.toml", "--dry-run")
    assert "names notes.txt, a link that leads out of its folder" in said
    assert said.endswith(f"add --prompts {secret} to the command\n")
    main(["transfer", "--recipe", "theirs/r.toml", "--prompts", str(secret), "--dry-run"])
    Path("theirs/notes.txt").unlink()
    Path("theirs/r.toml").write_text(f'{NAMED}prompts = "link.txt"\n')
    Path("theirs/own.txt").write_text("one fox\ntwo dogs\n")
    Path("theirs/link.txt").symlink_to("own.txt")
    main(["transfer", "--recipe", "theirs/r.toml", "--dry-run"])


def test_a_hub_id_of_a_recipe_is_no_folder_of_its_reader(here, capsys):
    Path("work").mkdir()
    Path("mine").rename("work/private")
    Path("r.toml").write_text(NAMED.replace('"mine"', '"work/private"'))
    said = refused(capsys, "transfer", "--recipe", "r.toml", "--dry-run")
    assert "names work/private on the hub, and the current folder has a path of this name" in said
    main(["transfer", "./work/private", "--recipe", "r.toml", "--dry-run"])


def test_a_file_that_is_not_found_is_asked_for_by_its_flag(here, capsys):
    (here / "elsewhere").mkdir()
    for name in ("source", "my prompts.txt"):
        (here / name).rename(here / "elsewhere" / name)
    Path("r.toml").write_text(NAMED)
    said = refused(capsys, "transfer", "--recipe", "r.toml", "--dry-run")
    assert "recipe r.toml names source without its folder: add --source PATH/source\n" in said
    Path("r.toml").write_text(f'{NAMED}prompts = "my prompts.txt"\n'.replace('"mine"', '"theirs"'))
    said = refused(capsys, "transfer", "--recipe", "r.toml", "--dry-run")
    assert said.endswith(": add PATH/theirs --source PATH/source --prompts 'PATH/my prompts.txt'\n")
    given = ["mine", "--source", "elsewhere/source", "--prompts", "elsewhere/my prompts.txt"]
    main(["transfer", *given, "--recipe", "r.toml", "--dry-run"])


def commands(folder):
    """The command that the card, the recipe and the page print."""
    card, head = (folder / "README.md").read_text(), (folder / "recipe.toml").read_text()
    (printed,) = re.findall(r"```sh\n(jcrosslora transfer .*)\n```", card)
    assert head.splitlines()[1] == f"# {printed}"
    main(["report", str(folder), "--out", str(folder / "page.html")])
    page = (folder / "page.html").read_text()
    assert printed in [unescape(one) for one in re.findall(r"<code>([^<]*)</code>", page)]
    return printed


def test_the_printed_command_repeats_a_transfer(house, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    given = [house / "mine", "--source", house / "source", "--target", house / "target", "--out", tmp_path / "moved"]
    given += ["--method", "theseus", "--prompts", house / "my prompts.txt", "--dtype", "bfloat16", "--seed", "5"]
    given += ["--source-template", house / "source.jinja", "--target-template", house / "target.jinja"]
    main(["transfer", *map(str, given), "--table", "none"])
    printed = commands(tmp_path / "moved")
    named = "PATH/mine --source PATH/source --target PATH/target --source-template PATH/source.jinja"
    named += " --target-template PATH/target.jinja --prompts 'PATH/my prompts.txt'"
    assert printed == f"jcrosslora transfer {named} --recipe recipe.toml"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    Path("recipe.toml").write_bytes((tmp_path / "moved" / "recipe.toml").read_bytes())
    main(shlex.split(printed.replace("PATH", str(house)))[1:])
    for name in (WEIGHTS, "adapter_config.json", "README.md", "recipe.toml", "transfer_report.json"):
        assert Path("moved", name).read_bytes() == (tmp_path / "moved" / name).read_bytes(), name


def test_what_is_on_the_hub_needs_no_flag(house, tmp_path):
    result = jcl.transfer(house / "mine", house / "source", house / "target", "copy", cache=False)
    text = result.report.recipe_toml.replace('"source"', '"org/source"').replace('"mine"', '"org/mine"')
    report = msgspec.structs.replace(result.report, recipe_toml=text)
    head = (dataclasses.replace(result, report=report).save(tmp_path / "moved") / "recipe.toml").read_text()
    assert head.splitlines()[1] == "# jcrosslora transfer --target PATH/target --recipe recipe.toml"


def test_a_damaged_recipe_in_a_report_is_one_error(house, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    result = jcl.transfer(house / "mine", house / "source", house / "target", "copy", cache=False)
    report = result.save(tmp_path / "moved") / "transfer_report.json"
    for recipe in ('adapter = "mine', f"adapter = {'[' * 9999}", 'source = "a"\nsource = "b"'):
        report.write_text(json.dumps(json.loads(report.read_text()) | {"recipe_toml": recipe}))
        assert "the recipe in the report is not TOML" in refused(capsys, "report", tmp_path / "moved")
