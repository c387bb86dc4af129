"""The model card: front matter that the hub takes, text that names everything."""

import json
import tomllib

import pytest

import jcrosslora as jcl
from jcrosslora.adapter.records import AdapterOrigin
from jcrosslora.maps.moved import ModuleRow, UnmappedSource
from jcrosslora.maps.transport import AlignRecipe
from jcrosslora.report import Base, Verdict, complete, model_card


def report(base_name="google/gemma-3-270m", source_adapter="owner/lora", **changes) -> jcl.TransferReport:
    figures = {"energy": 1.0, "norm_before": 1.0, "norm_after": 1.0}
    return jcl.TransferReport(
        **{
            "version": "1",
            "verdict": Verdict("chance", "at chance level:\nexpect no effect"),
            "recipe_toml": 'method = "cross-lora"\nrank = 320\n',
            "recipe": AlignRecipe("cross-lora"),
            "source": Base("owner/small", revision="v1", digest="sha256:aa"),
            "target": Base(base_name, digest="sha256:bb"),
            "adapter": AdapterOrigin(source_adapter),
            "layers": (0,),
            "rows": (ModuleRow(target="q_proj", source="q_proj", role="q|k", kept=0.1, **figures),),
            "unmapped_targets": (),
            "unmapped_sources": (UnmappedSource("model.layers.29.self_attn.q_proj", 0.015),),
            "energy": 1.0,
            "warnings": ("Signs are not anchored.",),
            **changes,
        }
    )


def card(**changes) -> str:
    return model_card(report(**changes))


def front_matter(text: str) -> dict:
    yaml = pytest.importorskip("yaml")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("value", ["a/b", 'quote " and \\', "tab\t \x00 \x1f \x7f", "Köln 日本 \U0001f600", 8, 1e-05])
def test_recipe_values_survive_a_round_trip(value):
    found = complete(report(asked={"x": value}), jcl.methods.CrossLoRA())
    assert tomllib.loads(found.recipe_toml)["x"] == value


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
    assert "| q\\|k | 1 | 10.0% |" in text
    assert "model.layers.29.self_attn.q_proj | 1.50%" in text
    assert "- Signs are not anchored." in text
    assert "licences of the source adapter, of the source base model and of the target base model" in text


@pytest.mark.parametrize(
    ("ref", "profile", "shown"),
    [
        ("google/gemma-3-270m", "portable", 'AutoModelForCausalLM.from_pretrained("google/gemma-3-270m")\n'),
        ("gemma.gguf", "peft", 'AutoModelForCausalLM.from_pretrained(".", gguf_file="gemma.gguf")\n'),
        ("gemma.gguf", "gguf", "llama-cli --model gemma.gguf --lora adapter.gguf"),
        ("gemma.gguf", "mlx", "mlx_lm.generate --model google/gemma-3-270m --adapter-path FOLDER"),
    ],
)
def test_a_card_shows_how_to_load_the_adapter(ref, profile, shown):
    text = model_card(report(target=Base("google/gemma-3-270m", ref)), profile)
    fence = text.split("## Use\n\n```")[1].split("```")[0]
    assert shown in fence
    if fence.startswith("python\n"):
        compile(fence.removeprefix("python\n"), "card", "exec")


def test_empty_sections_are_left_out():
    text = card(unmapped_sources=(), warnings=(), rows=())
    assert "Not moved" not in text
    assert "Warnings" not in text
    assert "Diagnostics" not in text


def test_special_characters_in_names_are_escaped():
    matter = front_matter(card(base_name="owner/base-1.5_x", source_adapter="a`b\nc: {", recipe_toml="x = 1"))
    assert matter["base_model"] == json.loads('"owner/base-1.5_x"')
