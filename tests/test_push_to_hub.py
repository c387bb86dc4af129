"""Uploads of results, against a stand-in for the hub's client that records what it is given."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import pytest
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora.evidence.probes.text_files import read_prompts
from jcrosslora.methods import PadTruncate
from jcrosslora.methods.update import Update
from jcrosslora.text import Completion, Message


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    source, target = (jcl.open_base(write_llama(folder / name, seed=seed)) for seed, name in enumerate(("one", "two")))
    return jcl.transfer(random_adapter(source, roles={"q_proj"}), source, target, "pad-truncate", cache=False)


@pytest.fixture
def hub(monkeypatch):
    """The calls that an upload makes; set `hub.error` to have the upload refused."""

    class Hub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("repo", repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            if failure:
                raise failure[0]
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            calls.append(("upload", repo_id, files, commit_message))
            return f"https://hub/{repo_id}"

    calls, failure = [], []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return calls, failure


def test_a_result_is_uploaded_with_its_card_recipe_and_report_and_is_private(result, hub):
    assert result.push_to_hub("me/moved", token="secret") == "https://hub/me/moved"
    token, repo, upload = hub[0]
    assert token == ("token", "secret")
    assert repo == ("repo", "me/moved", True, True)
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.toml", "transfer_report.json"}
    assert upload[2].keys() == names
    assert b"secret" not in b"".join(upload[2].values())


def test_a_refused_upload_is_one_clear_error(result, hub):
    hub[1].append(OSError("403 Forbidden:\n you may not write there"))
    refusal = r"me/moved: the hub did not accept the upload .*403 Forbidden: you may not"
    with pytest.raises(jcl.OutputError, match=refusal):
        result.push_to_hub("me/moved")


def test_completions_lie_beside_a_written_adapter_and_are_not_uploaded(result, hub, tmp_path):
    said = Completion((Message("user", "Où?"),), "{}"), Completion("Q: what?\nA:", " this", ended=False)
    kept = dataclasses.replace(result, completions=said)
    lines = (kept.save(tmp_path / "out") / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    chat = [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "{}"}]
    assert list(map(json.loads, lines)) == [
        {"messages": chat},
        {"prompt": "Q: what?\nA:", "completion": " this", "ended": False},
    ]
    assert read_prompts(tmp_path / "out" / "completions.jsonl") == [one.prompt for one in said]
    kept.push_to_hub("me/moved")
    assert "completions.jsonl" not in hub[0][2][2]


@dataclasses.dataclass(frozen=True)
class Fitted(PadTruncate):
    """A method that claims to be fitted to one completion."""

    own: bool = True

    def finalize(self, context, moved):
        return Update(moved, completions=(Completion("Q: what?"),), wrote_prompts=self.own)


@pytest.mark.parametrize("own", [True, False])
def test_the_completions_of_a_fit_are_kept_unless_the_user_gave_the_prompts(result, own):
    source, target = result.report.source.ref, result.report.target.ref
    adapter = random_adapter(jcl.open_base(source), roles={"q_proj"})
    moved = jcl.transfer(adapter, source, target, Fitted(own=own), cache=False)
    assert moved.texts == ("Q: what?",)
    assert [one.prompt for one in moved.completions] == (["Q: what?"] if own else [])
