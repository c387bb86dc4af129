"""Uploads to the hub, by its own client against a server on loopback."""

import dataclasses
import json
import os
import shutil
import time
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from command_line import main
from hub_server import BREAK, TOKEN, Repo, serve_hub
from huggingface_hub import ModelCardData
from safetensors.numpy import load_file, save_file
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora.adapter import split_card
from jcrosslora.cli import transfer
from jcrosslora.methods import FitFacts

# By the hub's client, of the HTTP library that it uses.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PUT = "PUT object"
SECRET = "what the user would not publish"
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.toml", "transfer_report.json"}
ID = "me/moved"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for seed, name in enumerate(("one", "two")):
        write_llama(folder / name, seed=seed, layers=1)
    adapter = random_adapter(jcl.open_base(folder / "one"), roles={"q_proj"})
    jcl.save_adapter(adapter, folder / "adapter", base_name="org/one")
    card = "---\nlicense: apache-2.0\n---\n# mine\n"
    (folder / "adapter" / "README.md").write_text(card)
    return folder


@pytest.fixture(scope="module")
def result(bases):
    found = jcl.transfer(bases / "adapter", bases / "one", bases / "two", "pad-truncate", cache=False)
    report = msgspec.structs.replace(found.report, examples=(SECRET,), fit=FitFacts())
    return dataclasses.replace(found, report=report)


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    return result.save(tmp_path_factory.mktemp("written") / "moved")


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "moved")


@pytest.fixture(scope="module")
def server():
    yield from serve_hub()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The server, empty, with a user who is logged in; retries do not wait."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    server.reset()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose servers speak another protocol
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(_http, "time", SimpleNamespace(**(vars(time) | {"sleep": lambda seconds: None})))
    return server


def stopped(*arguments) -> int:
    with pytest.raises(SystemExit) as found:
        main([str(argument) for argument in arguments])
    assert isinstance(found.value.code, int)
    return found.value.code


def uploaded_card(hub, repo_id: str = ID) -> tuple[dict, str]:
    return split_card(hub.repos[repo_id].files["README.md"].decode())


def test_a_folder_is_uploaded_whole_to_a_private_repository_and_reads_back(hub, folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pushed = jcl.push_to_hub(folder, ID)
    repo = hub.repos[ID]
    assert repo.private
    assert repo.files.keys() == set(pushed.files) == FILES
    assert (pushed.url, pushed.commit) == (f"{hub.url}/{ID}", f"{1:040x}")
    assert len(repo.commits) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert TOKEN.encode() not in b"".join((*repo.files.values(), *before.values()))
    for name, content in repo.files.items():
        (tmp_path / "back").mkdir(exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    (q, back), *_ = jcl.load_adapter(tmp_path / "back").modules.items()
    np.testing.assert_array_equal(back.a, jcl.load_adapter(folder).modules[q].a)


def test_the_metadata_names_base_library_tags_and_the_licence_of_the_source_adapter(hub, folder):
    jcl.push_to_hub(folder, ID, base_model="google/gemma-3-270m")
    data, body = uploaded_card(hub)
    assert data["base_model"] == "google/gemma-3-270m"
    assert data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["license"]) == ("peft", "apache-2.0")
    assert data["tags"] == ["base_model:adapter:google/gemma-3-270m", "lora", "jcrosslora"]
    assert ModelCardData(**data).to_dict() == data
    assert body.startswith("\n# ")
    assert json.loads(hub.repos[ID].files["adapter_config.json"])["base_model_name_or_path"] == data["base_model"]


def test_a_base_without_a_hub_id_is_left_out_with_a_note(hub, folder):
    pushed = jcl.push_to_hub(folder, ID)
    assert pushed.base_model is None
    assert pushed.notes == ("the card names no base model, as 'two' is no hub id; give its hub id with --base-model "
                            "(base_model=)",)  # fmt: skip
    assert uploaded_card(hub)[0].keys() == {"library_name", "license", "pipeline_tag", "tags"}


def test_completions_go_along_only_if_the_user_says_so(hub, folder):
    assert SECRET in (folder / "README.md").read_text()
    jcl.push_to_hub(folder, ID)
    assert SECRET.encode() not in b"".join(hub.repos[ID].files.values())
    assert "## Fit" in uploaded_card(hub)[1]
    assert json.loads(hub.repos[ID].files["transfer_report.json"])["examples"] == []
    jcl.push_to_hub(folder, ID, with_completions=True)
    for name in ("README.md", "transfer_report.json"):
        assert SECRET.encode() in hub.repos[ID].files[name]


def test_the_files_that_hold_completions_go_along_with_them(hub, folder):
    own = {"completions.jsonl": '{"prompt": "Q", "completion": "A"}\n', "report.html": "<p>Q: A</p>"}
    for name, text in own.items():
        (folder / name).write_text(text)
    said = "not uploaded, as it is no part of the adapter: completions.jsonl, report.html"
    assert said in jcl.push_to_hub(folder, ID).notes
    assert not own.keys() & hub.repos[ID].files.keys()
    jcl.push_to_hub(folder, ID, with_completions=True)
    assert own.keys() <= hub.repos[ID].files.keys()


def test_what_is_there_is_not_sent_again_and_other_files_stay(hub, folder):
    (folder / ".env").write_text("KEY=1")
    (folder / "optimizer.pt").write_bytes(b"x")
    hub.repos[ID] = Repo(private=True, files={"figure.png": b"png", ".gitattributes": b""})
    pushed = jcl.push_to_hub(folder, ID)
    assert "not uploaded, as it is no part of the adapter: .env, optimizer.pt" in pushed.notes
    assert hub.repos[ID].files.keys() == FILES | {"figure.png", ".gitattributes"}
    assert "POST create" not in hub.requests
    assert jcl.push_to_hub(folder, ID).commit == pushed.commit
    assert (hub.count(PUT), len(hub.repos[ID].commits)) == (1, 1)
    (folder / "recipe.toml").write_text("method = 'copy'\n")
    assert jcl.push_to_hub(folder, ID).commit != pushed.commit
    assert hub.count(PUT) == 1


@pytest.mark.parametrize("fault", [BREAK, 500])
def test_an_upload_that_broke_off_goes_on_with_the_same_command(hub, folder, capsys, fault):
    hub.faults["object"] = [fault] * 10
    assert stopped("push", folder, ID) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"jcrosslora: {ID}: ")
    said = r"the hub answers 500 (Error while uploading 'adapter_model.safetensors' to the Hub.: fault of object)"
    assert (said if fault else "the upload broke off") in error
    assert "repeat the upload: what was sent is not sent again" in error
    assert "X-Amz" not in error
    assert hub.repos[ID].files == {}
    hub.faults["object"], hub.faults["commit"] = [], [fault]
    assert stopped("push", folder, ID) == 2  # the weights are there now, but no commit has them
    puts = hub.count(PUT)
    main(["push", str(folder), ID])
    assert hub.repos[ID].files.keys() == FILES
    assert hub.count(PUT) == puts
    assert f"uploaded: {hub.url}/{ID} (commit" in capsys.readouterr().out


def test_a_short_fault_is_overcome_by_the_client(hub, folder):
    hub.faults["object"] = [BREAK, 503]
    jcl.push_to_hub(folder, ID)
    assert hub.count(PUT) == 3


@pytest.mark.parametrize(
    ("step", "status", "advice"),
    [
        ("info", 401, "log in with `hf auth login`"),
        ("create", 401, "log in with `hf auth login`"),
        ("create", 403, "write access to me, or a name of your own"),
        ("preupload", 403, "write access to me, or a name of your own"),
        ("commit", 404, "check the name"),
        ("commit", 409, "something else changes the repository at the same time"),
        ("commit", 412, "something else changes the repository at the same time"),
        ("create", 500, "the hub has a fault"),
        ("commit", 500, "the hub has a fault"),
        ("info", BREAK, "check the network and HF_HUB_OFFLINE"),
        ("commit", BREAK, "check the network and HF_HUB_OFFLINE"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(hub, folder, capsys, step, status, advice):
    hub.faults[step] = [(status, f"said by the hub:\n{TOKEN}") if status else BREAK] * 10
    assert stopped("push", folder, ID) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert f"{ID}: " in printed.err
    assert advice in printed.err
    assert TOKEN not in printed.err
    if status:
        assert f"answers {status} (" in printed.err
        assert "said by the hub: hf_***" in printed.err
    hub.faults.clear()
    main(["push", str(folder), ID])
    assert hub.repos[ID].files.keys() == FILES


def test_a_409_of_a_repository_made_in_the_meantime_is_no_failure(hub, folder, monkeypatch):
    hub.faults["info"] = [404]
    hub.repos[ID] = Repo(private=True)
    jcl.push_to_hub(folder, ID)
    assert "POST create" in hub.requests
    assert hub.repos[ID].files.keys() == FILES


def test_metadata_that_the_hub_refuses_is_named_before_weights_are_sent(hub, folder):
    hub.metadata_errors.append('"license" must be one of [apache-2.0, mit]')
    with pytest.raises(
        jcl.OutputError, match=r'answers 400 \(Invalid metadata in README\.md\. - "license" must be one'
    ):
        jcl.push_to_hub(folder, ID)
    assert hub.count(PUT) == 0


def test_who_is_not_logged_in_or_has_a_broken_token_is_told_so(hub, folder, monkeypatch):
    with pytest.raises(jcl.UsageError, match=r"the token \(not shown\)") as found:
        jcl.push_to_hub(folder, ID, token=f"{TOKEN}\n")
    assert TOKEN not in str(found.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(jcl.OutputError, match="not logged in to the hub: run `hf auth login`, or set HF_TOKEN"):
        jcl.push_to_hub(folder, ID)
    assert hub.requests == []
    with pytest.raises(jcl.OutputError, match="answers 401"):
        jcl.push_to_hub(folder, ID, token="hf_another")


def test_offline_is_named(hub, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(jcl.OutputError, match="HF_HUB_OFFLINE"):
        jcl.push_to_hub(folder, ID)


def test_a_public_repository_is_written_only_if_the_user_says_so(hub, folder, capsys):
    hub.repos[ID] = Repo(private=False)
    assert stopped("push", folder, ID) == 2
    assert "is public, expected a private one: allow it with --public" in capsys.readouterr().err
    assert hub.repos[ID].files == {}
    main(["push", str(folder), ID, "--public"])
    assert hub.repos[ID].files.keys() == FILES
    jcl.push_to_hub(folder, "me/new", private=False)
    assert not hub.repos["me/new"].private
    hub.repos["me/old"] = Repo(private=True)
    assert "private and stays so" in jcl.push_to_hub(folder, "me/old", private=False).notes[-1]


@pytest.mark.parametrize(
    ("name", "files", "refusal"),
    [
        ("model.safetensors", {"config.json"}, "holds a base model"),
        ("adapters.safetensors", {"adapter_config.json"}, r"holds adapters\.safetensors, which does not go with"),
    ],
)
def test_a_repository_that_holds_something_else_is_not_overwritten(hub, folder, name, files, refusal):
    hub.repos[ID] = Repo(private=True, files=dict.fromkeys({name, "README.md", *files}, b"theirs"))
    with pytest.raises(jcl.OutputError, match=refusal):
        jcl.push_to_hub(folder, ID)
    assert set(hub.repos[ID].files.values()) == {b"theirs"}


def damage_weights(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def damage_rank(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))


@pytest.mark.parametrize(
    ("damage", "refusal"),
    [
        (damage_weights, "safetensors"),
        (damage_rank, "is not a whole adapter .*has rank"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors here"),
        (lambda folder: (folder / "transfer_report.json").write_text("{"), r"transfer_report\.json: is damaged"),
        (lambda folder: os.truncate(folder / "transfer_report.json", 10**9), r"cannot be read \(1000 MB, and at most"),
        (lambda folder: (folder / "transfer_report.json").write_text('{"schema": 1}'), "has schema 1, expected 4"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), r"README\.md: its metadata is not YAML"),
        (lambda folder: (folder / "README.md").write_bytes(b"\xff"), r"README\.md: cannot be read \(not UTF-8\)"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_what_is_no_whole_adapter_is_refused_before_the_hub_is_asked(hub, folder, damage, refusal):
    damage(folder)
    with pytest.raises(jcl.AdapterError, match=refusal):
        jcl.push_to_hub(folder, ID)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "recipe.toml"])
def test_a_link_out_of_the_folder_is_not_followed(hub, folder, tmp_path, name):
    (tmp_path / "private").write_text(SECRET)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(jcl.AdapterError, match=f"{name}: is a link that leads out of the folder"):
        jcl.push_to_hub(folder, ID)
    assert not hub.requests


def test_the_links_of_the_hubs_cache_are_followed(hub, folder, tmp_path):
    snapshot = tmp_path / "models--me--old" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, snapshot.parents[1] / "blobs")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    jcl.push_to_hub(snapshot, ID)
    assert hub.repos[ID].files.keys() == FILES


@pytest.mark.parametrize("name", ["moved", "me/", "me/a/b", "me/a--b", "-me/a", "me/moved.git"])
def test_what_is_no_name_of_a_repository_is_refused_before_the_hub_is_asked(hub, folder, result, name):
    with pytest.raises(jcl.UsageError, match="is not the name of a repository"):
        jcl.push_to_hub(folder, name)
    with pytest.raises(jcl.UsageError, match="is not the name of a repository"):
        result.push_to_hub(name)
    with pytest.raises(jcl.UsageError, match="is not a hub id"):
        jcl.push_to_hub(folder, ID, base_model="./gemma")
    assert hub.requests == []


def test_the_card_of_another_tool_is_mended_and_kept_otherwise(hub, bases, tmp_path):
    folder = shutil.copytree(bases / "adapter", tmp_path / "trained")
    config = json.loads((folder / "adapter_config.json").read_text())
    local = {"base_model_name_or_path": "/home/me/models/gemma"}
    (folder / "adapter_config.json").write_text(json.dumps(config | local))
    card = "---\nbase_model: /home/me/models/gemma\ntags:\n- base_model:adapter:/home/me/models/gemma\n- mine\n"
    (folder / "README.md").write_text(card + "language: [de]\n---\n\n# Title\n\nText.\n")
    pushed = jcl.push_to_hub(folder, ID)
    assert "as 'gemma' is no hub id" in pushed.notes[0]
    data, body = uploaded_card(hub)
    assert data == {"tags": ["mine", "lora"], "language": ["de"], "library_name": "peft"}
    assert body == "\n# Title\n\nText.\n"
    assert b"/home/me" not in b"".join(hub.repos[ID].files.values())
    jcl.push_to_hub(folder, ID, base_model="google/gemma")
    assert uploaded_card(hub)[0]["base_model"] == "google/gemma"


def test_no_path_of_report_recipe_card_or_configuration_is_uploaded(hub, folder):
    mine = "/home/me/secret/x"
    report = json.loads((folder / "transfer_report.json").read_text())
    report["adapter"] |= {"name": mine, "base_name": mine, "ignored": [f"not moved: {mine}/a.safetensors: is damaged"]}
    (folder / "transfer_report.json").write_text(json.dumps(report))
    (folder / "recipe.toml").write_text(f'out = "{mine}"\nmethod = "copy"\nprompts = "C:\\\\my data\\\\secret\\\\p"\n')
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"{card}\nTrained on {mine}.jsonl.\n")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": {"parent_library": mine}}))
    jcl.push_to_hub(folder, ID, with_completions=True)
    files = hub.repos[ID].files
    assert [name for name, data in files.items() if b"secret" in data or b"/home/me" in data] == []
    assert files["recipe.toml"].decode() == 'out = "x"\nmethod = "copy"\nprompts = "p"\n'
    assert json.loads(files["transfer_report.json"])["adapter"]["ignored"] == ["not moved: a.safetensors: is damaged"]
    assert json.loads(files["adapter_config.json"]) == config | {"auto_mapping": {"parent_library": "x"}}
    assert files["README.md"].decode() == f"{card}\nTrained on x.jsonl.\n"


@pytest.mark.parametrize("profile", ["portable", "gguf"])
def test_weights_whose_header_holds_a_path_are_refused_until_they_are_exported(hub, bases, tmp_path, profile):
    base = jcl.open_base(bases / "one")
    if profile == "gguf":
        pytest.importorskip("gguf")
    mine, mark = "/home/me/secret/models/base", "b" * 27
    folder = jcl.save_adapter(
        jcl.load_adapter(bases / "adapter"), tmp_path / "mine", base=base, base_name=mark, profile=profile
    )
    weights = folder / ("adapter.gguf" if profile == "gguf" else "adapter_model.safetensors")
    if profile == "gguf":
        weights.write_bytes(weights.read_bytes().replace(mark.encode(), mine.encode()))
    else:
        save_file(load_file(weights), weights, {"jcrosslora.adapter": json.dumps({"base_name": mine})})
    with pytest.raises(jcl.AdapterError, match=r"its header holds a path .*: write the adapter again"):
        jcl.push_to_hub(folder, ID)
    assert hub.requests == []
    jcl.export_adapter(jcl.ExportSettings((str(folder),), str(tmp_path / "out"), profile=profile, base=base.ref))
    jcl.push_to_hub(tmp_path / "out", ID)
    assert b"secret" not in b"".join(hub.repos[ID].files.values())


def test_several_bases_of_a_card_stay_unless_one_is_given(hub, bases, tmp_path):
    folder = shutil.copytree(bases / "adapter", tmp_path / "mine")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "./one"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nbase_model:\n- a/b\n- c/d\ntags: mine\n---\n# mine\n")
    pushed = jcl.push_to_hub(folder, ID)
    assert pushed.notes == ("the card names several base models, which stay; name one with --base-model (base_model=)",)
    data, _ = uploaded_card(hub)
    assert (data["base_model"], data["tags"]) == (["a/b", "c/d"], "mine")
    assert jcl.push_to_hub(folder, ID, base_model="a/b").base_model == "a/b"
    assert uploaded_card(hub)[0]["base_model"] == "a/b"


def test_a_card_that_is_right_is_sent_as_it_is_and_a_missing_one_is_written(hub, bases, tmp_path):
    folder = shutil.copytree(bases / "adapter", tmp_path / "trained")
    card = "---\nlibrary_name: peft\nbase_model: org/one\nbase_model_relation: adapter\n"
    card += "tags: ['base_model:adapter:org/one', lora]  # by hand\n---\nText\n"
    (folder / "README.md").write_text(card)
    assert jcl.push_to_hub(folder, ID).base_model == "org/one"
    assert hub.repos[ID].files["README.md"].decode() == card
    (folder / "README.md").unlink()
    jcl.push_to_hub(folder, ID)
    data, body = uploaded_card(hub)
    assert (data["base_model"], data["library_name"]) == ("org/one", "peft")
    assert "license" not in data
    assert body == "\n# trained\n\nA LoRA adapter of `org/one`.\n"


def test_a_dry_run_shows_the_files_and_asks_nobody(hub, folder, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    main(["push", str(folder), ID, "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["files"].keys() == FILES
    main(["push", str(folder), ID, "--dry-run"])
    assert "would upload: adapter_model.safetensors" in capsys.readouterr().out
    assert hub.requests == []


def test_a_dry_run_refuses_what_is_no_name_of_a_repository(hub, folder, capsys):
    assert stopped("push", folder, "https://hub/me/moved", "--dry-run") == 2
    assert "is not the name of a repository" in capsys.readouterr().err


def test_a_result_in_memory_is_uploaded_and_uploaded_again_without_sending(hub, result):
    assert result.push_to_hub(ID, token=TOKEN).files == jcl.push_to_hub(result, ID).files
    assert hub.repos[ID].files.keys() == FILES
    assert (hub.count(PUT), len(hub.repos[ID].commits)) == (1, 1)
    with pytest.raises(jcl.OutputError, match=r"holds adapter_model\.safetensors, which does not go with adapters"):
        result.push_to_hub(ID, profile="mlx")


@pytest.mark.parametrize(
    ("profile", "names", "library"),
    [
        ("mlx", {"adapter_config.json", "adapters.safetensors"}, "mlx"),
        ("gguf", {"adapter.gguf"}, "gguf"),
    ],
)
def test_adapters_of_other_engines_are_uploaded_in_their_own_format(hub, result, profile, names, library):
    if profile == "gguf":
        pytest.importorskip("gguf")
    result.push_to_hub(ID, profile=profile, base_model="org/two")
    files = hub.repos[ID].files
    assert files.keys() == names | {"README.md", "recipe.toml", "transfer_report.json"}
    assert (uploaded_card(hub)[0]["library_name"], uploaded_card(hub)[0]["base_model"]) == (library, "org/two")
    if profile == "mlx":
        assert json.loads(files["adapter_config.json"])["model"] == "org/two"


def test_a_transfer_uploads_what_it_wrote_or_says_how_to_go_on(hub, bases, tmp_path, capsys):
    def transfer(out, repo_id):
        adapter, source, target = (str(bases / name) for name in ("adapter", "one", "two"))
        flags = ["--source", source, "--target", target, "--out", str(tmp_path / out), "--method", "pad-truncate"]
        return ["transfer", adapter, *flags, "--target-id", "org/two", "--push-to", repo_id]

    main([*transfer("a", ID), "--json"])
    assert json.loads(capsys.readouterr().out)["pushed"]["url"] == f"{hub.url}/{ID}"
    assert uploaded_card(hub)[0]["base_model"] == "org/two"
    hub.repos["me/public"] = Repo(private=False)
    assert stopped(*transfer("b", "me/public")) == 2
    assert not (tmp_path / "b").exists()  # refused before the work
    hub.faults["commit"] = [403]
    capsys.readouterr()
    assert stopped(*transfer("c", "me/c")) == 2
    printed = capsys.readouterr().err
    assert f"written to {tmp_path / 'c'}: go on with `jcrosslora push {tmp_path / 'c'} me/c`" in printed
    assert printed.count("\n") == 1
    main(["push", str(tmp_path / "c"), "me/c"])
    assert hub.repos["me/c"].files.keys() == FILES


def test_a_checkpoint_of_orbax_is_not_moved_for_the_hub(bases, tmp_path, capsys):
    given = [bases / "adapter", "--source", bases / "one", "--target", bases / "two", "--out", tmp_path / "out"]
    assert stopped("transfer", *given, "--profile", "tunix", "--push-to", ID) == 2
    assert "the hub does not know Orbax" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_upload_says_that_the_adapter_is_written(hub, bases, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "push_to_hub", interrupt)
    out, places = tmp_path / "out", ["--source", bases / "one", "--target", bases / "two"]
    given = [bases / "adapter", *places, "--out", out, "--method", "pad-truncate", "--table", "none"]
    assert stopped("transfer", *given, "--push-to", ID) == 130
    assert f"the adapter is written to {out}: go on with `jcrosslora push {out} {ID}`" in capsys.readouterr().err
    assert jcl.load_adapter(out).modules


def test_the_licence_of_an_adapter_of_the_hub_comes_from_its_card(bases, monkeypatch, tmp_path):
    import huggingface_hub

    def download(repo, name, revision=None, **_):
        return shutil.copy(bases / "adapter" / name, tmp_path)  # what was not asked for is not there

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert jcl.load_adapter("owner/adapter").info.licence == "apache-2.0"
