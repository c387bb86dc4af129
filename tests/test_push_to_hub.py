"""Uploads of results, against a stand-in for the hub's client that records what it is given."""

from pathlib import Path

import huggingface_hub
import pytest
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl


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
