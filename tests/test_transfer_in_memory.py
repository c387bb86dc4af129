"""Transfers of what a program already holds: weights, live models, live adapters; and results in live models."""

import re

import numpy as np
import pytest
from decoder_pairs import run
from test_transfer import WIDER
from tiny_bases import delta, llama_config, llama_tensors, random_adapter, write_llama, write_tokenizer
from tiny_models import tiny_model

import jcrosslora as jcl
from jcrosslora.adapter import split_card, to_pytree
from jcrosslora.decoder import load_model, stack_adapter

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source base and a wider target with tokenizers, as files."""
    folder = tmp_path_factory.mktemp("bases")
    write_llama(folder / "source", seed=0)
    write_llama(folder / "target", seed=1, first_token=20, **WIDER)
    return folder


def test_weights_in_memory_move_an_adapter_as_files_do(folder, tmp_path):
    (tmp_path / "tokens").mkdir()
    write_tokenizer(tmp_path / "tokens", 120, 20)
    files = jcl.open_base(folder / "source"), jcl.open_base(folder / "target")
    memory = (
        jcl.open_base(llama_tensors(seed=0), config=llama_config(), tokenizer=folder / "source"),
        jcl.open_base(llama_tensors(seed=1, **WIDER), config=llama_config(**WIDER), tokenizer=tmp_path / "tokens"),
    )
    adapter = random_adapter(files[0], scale=0.5)
    wanted = jcl.transfer(adapter, *files, "cross-lora", cache=False)
    for given in (adapter, to_pytree(adapter)):
        found = jcl.transfer(given, *memory, "cross-lora", cache=False)
        for name, factors in wanted.adapter.modules.items():
            np.testing.assert_allclose(delta(found.adapter.modules[name]), delta(factors), atol=1e-5)
    assert not list(tmp_path.glob("**/*.safetensors"))  # nothing is written


@pytest.mark.filterwarnings("ignore")  # of peft and transformers about each other
def test_a_live_adapter_moves_between_live_models_and_into_the_target(tmp_path):
    source, target = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(source, config)
    result = jcl.transfer(adapted, adapted, target, "copy", cache=False)
    base = jcl.open_base(target)
    tokens = np.random.default_rng(0).integers(3, 90, (2, 9))
    wanted = run(load_model(base), tokens, adapter=stack_adapter(result.adapter, base))
    live = result.to_peft(target)
    with torch.no_grad():
        found = live(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(found, np.asarray(wanted), atol=2e-4)
    assert result.to_pytree().keys() == result.adapter.modules.keys()


def test_a_result_in_a_notebook_shows_the_verdict_and_escapes_every_text(folder):
    source, target = jcl.open_base(folder / "source"), jcl.open_base(folder / "target", name="<b>&target")
    result = jcl.transfer(random_adapter(source), source, target, "pad-truncate", cache=False)
    page = result._repr_html_()
    assert result.verdict.level in page
    assert "<b>&target" not in page
    assert "&lt;b&gt;&amp;target" in page
    assert str(folder) not in page
    table = result.report._repr_html_()
    cells = re.findall(r"<td[^>]*>([^<]*)", table)
    assert cells[:2] == ["verdict", f"{result.verdict.level}: {result.verdict.text}"]
    assert f"{len(result.adapter.modules)} of rank {result.report.rank_before}" in cells
    assert f"{result.report.kept:.1%}" in cells
    assert str(folder) not in table
    assert "&target" not in table.replace("&amp;target", "")
    assert repr(result.report) == f"TransferReport(pad-truncate, source -> <b>&target: {result.verdict.text})"
    assert "\n" not in repr(result)


def test_a_saved_result_tells_no_path_and_its_recipe_runs_again(folder, tmp_path):
    adapter = tmp_path / "some" / "place" / "mine"
    jcl.save_adapter(random_adapter(jcl.open_base(folder / "source"), scale=0.3), adapter, base_name="org/source")
    result = jcl.transfer(adapter, folder / "source", folder / "target", jcl.methods.CrossLoRA(svd_rank=9))
    out = result.save(tmp_path / "out")
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
        assert str(folder).encode() not in path.read_bytes(), path.name
    from jcrosslora.cli.main import main

    places = ["--source", folder / "source", "--target", folder / "target", "--out", tmp_path / "again"]
    main(["transfer", *map(str, [adapter, "--recipe", out / "recipe.toml", *places])])
    again = jcl.load_adapter(tmp_path / "again")
    for name, factors in result.adapter.modules.items():
        np.testing.assert_allclose(delta(again.modules[name]), delta(factors), atol=1e-6)


def test_the_licence_of_the_source_adapter_goes_into_the_card(folder, tmp_path):
    adapter = tmp_path / "mine"
    jcl.save_adapter(random_adapter(jcl.open_base(folder / "source")), adapter, base_name="org/source")
    (adapter / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\nmine\n")
    out = jcl.transfer(adapter, folder / "source", folder / "target", "pad-truncate").save(tmp_path / "out")
    assert "license: cc-by-sa-4.0" in (out / "README.md").read_text()
    (adapter / "README.md").write_text("---\nlicense: [\n---\n")  # a damaged card is no reason to refuse
    out = jcl.transfer(adapter, folder / "source", folder / "target", "pad-truncate").save(tmp_path / "other")
    assert "license:" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "stated", "link"),
    [
        (None, "https://ai.google.dev/gemma/terms", "https://ai.google.dev/gemma/terms"),
        (None, "LICENSE.md", None),  # a file that does not move along
        ("me/mine", "./LICENSE.md", "https://huggingface.co/me/mine/blob/main/LICENSE.md"),
    ],
)
def test_a_licence_that_the_hub_does_not_know_keeps_name_and_address(folder, tmp_path, monkeypatch, name, stated, link):
    adapter = tmp_path / "mine"
    jcl.save_adapter(random_adapter(jcl.open_base(folder / "source")), adapter, base_name="org/source")
    matter = f"license: other\nlicense_name: my-terms\nlicense_link: {stated}\n"
    (adapter / "README.md").write_text(f"---\n{matter}---\nmine\n")
    if name is not None:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **_: str(_there(adapter / file)))
    out = jcl.transfer(name or adapter, folder / "source", folder / "target", "pad-truncate").save(tmp_path / "out")
    data = split_card((out / "README.md").read_text())[0]
    assert (data["license"], data["license_name"], data.get("license_link")) == ("other", "my-terms", link)


def _there(path):
    if not path.exists():
        raise OSError(path)
    return path


@pytest.mark.full
def test_a_fit_runs_behind_an_alignment(tmp_path):
    from probe_bases import CORPUS, write_base

    source = jcl.open_base(write_base(tmp_path / "source", 30, bos=True, layers=2))
    target = jcl.open_base(write_base(tmp_path / "target", 90, layers=2, hidden=32, head_dim=8, seed=1))
    adapter = random_adapter(source, scale=1.0, roles=("q_proj", "v_proj"))
    method = jcl.methods.Distill(completions=24, fit_rank=2, passes=1, answer_tokens=4, roles=("v_proj", "o_proj"))
    prompts = [f"{line} {number}" for number in range(6) for line in CORPUS]
    transport = jcl.align(source, target, method)
    result = jcl.shift(transport, adapter, prompts=prompts)
    assert result.report.fit.steps > 0
    assert result.texts
    assert set(result.report.ranks.values()) == {2}
    assert result.report.rank_sentence.startswith("the moved update has rank 2 in v_proj, o_proj, where")
    # The fit starts from zero, so no module has an update from the source; modules that the adapter lacks are fitted.
    rows = result.report.rows
    assert [row.target for row in rows] == [name for name in target.modules if name in result.report.ranks]
    assert {(row.role, row.source) for row in rows} == {("v_proj", ""), ("o_proj", "")}
    assert all(row.norm_after for row in rows)
