"""The model card: front matter that the hub takes, text that names everything."""

import json
import tomllib

import pytest

from jcrosslora.report.card import model_card
from jcrosslora.report.documents import _toml


def card(**changes) -> str:
    return model_card(
        **{
            "base_name": "google/gemma-3-270m",
            "source_adapter": "owner/lora",
            "method": "cross-lora",
            "recipe": 'method = "cross-lora"\nrank = 320\n',
            "bases": {
                "source": ("owner/small", "v1", "sha256:aa"),
                "target": ("google/gemma-3-270m", None, "sha256:bb"),
            },
            "verdict": "at chance level:\nexpect no effect",
            "table": [{"module": "q_proj", "kept": "10 | 20"}, {"module": "all", "kept": "1 %"}],
            "dropped": [("model.layers.29.self_attn.q_proj", "1.5%")],
            "notes": ["Signs are not anchored."],
            **changes,
        }
    )


def front_matter(text: str) -> dict:
    yaml = pytest.importorskip("yaml")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("value", ["a/b", 'quote " and \\', "tab\t \x00 \x1f \x7f", "Köln 日本 \U0001f600", 8, 1e-05])
def test_recipe_values_survive_a_round_trip(value):
    assert tomllib.loads(f"x = {_toml(value)}\n") == {"x": value}


def test_front_matter_names_the_base():
    matter = front_matter(card())
    assert matter["base_model"] == "google/gemma-3-270m"
    assert (matter["library_name"], matter["pipeline_tag"]) == ("peft", "text-generation")
    assert matter["tags"] == ["base_model:adapter:google/gemma-3-270m", "lora", "jcrosslora"]


@pytest.mark.parametrize("name", ["/models/gemma", "./gemma", "gemma", "a/b/c", "C:\\gemma", None])
def test_local_path_is_in_the_text_but_not_in_the_front_matter(name):
    text = card(base_name=name)
    matter = front_matter(text)
    assert "base_model" not in matter
    assert matter["tags"] == ["lora", "jcrosslora"]
    assert name is None or name in text


def test_folder_that_looks_like_a_hub_id_counts_as_a_path(tmp_path, monkeypatch):
    (tmp_path / "owner" / "base").mkdir(parents=True)
    assert "base_model" in front_matter(card(base_name="owner/base"))
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(card(base_name="owner/base"))


def test_card_contains_all_given_facts():
    text = card()
    for part in ("owner/lora", "owner/small", "v1", "sha256:aa", "sha256:bb", "rank = 320", "`cross-lora`"):
        assert part in text
    assert "**What to expect:** at chance level: expect no effect" in text
    assert "| q_proj | 10 \\| 20 |" in text
    assert "model.layers.29.self_attn.q_proj | 1.5%" in text
    assert "- Signs are not anchored." in text
    assert "licences of the source adapter, of the source base model and of the target base model" in text


def test_empty_sections_are_left_out():
    text = card(dropped=(), notes=(), table=())
    assert "Not moved" not in text
    assert "Warnings" not in text
    assert "Diagnostics" not in text


def test_special_characters_in_names_are_escaped():
    matter = front_matter(card(base_name="owner/base-1.5_x", source_adapter="a`b\nc: {", recipe="x = 1"))
    assert matter["base_model"] == json.loads('"owner/base-1.5_x"')
