"""Transfers from sources that are asked: from files to files, in memory, reports, and what is refused."""

import dataclasses
import io
import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from probe_bases import CORPUS, chat_base, write_base
from safetensors.numpy import load_file
from source_server import BASE, MODEL, serving
from test_sources import softened
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.cli.main import main
from jcrosslora.distill import completions, templates
from jcrosslora.distill.run import distill
from jcrosslora.distill.sources.served import ServedSource
from jcrosslora.distill.sources.torch import TorchSource
from jcrosslora.distill.task_search import KINDS, search
from jcrosslora.distill.templates import Sampler, templates_of
from jcrosslora.errors import AdapterError, MethodError, SourceError, UsageError
from jcrosslora.evaluate.engine_runs import quiet
from jcrosslora.evaluate.torch_models import load_base
from jcrosslora.methods import Distill, Method

FIT = {"completions": 22, "passes": 1, "fit_rank": 2, "answer_tokens": 4, "compared_tokens": 300}
FLAGS = ["--method", "distill", *(part for key, n in FIT.items() for part in ("--" + key.replace("_", "-"), str(n)))]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    source = softened(chat_base(folder / "source"))
    adapter = random_adapter(source, scale=0.3)
    jcl.save_adapter(adapter, folder / "adapter", base=source, profile="peft")
    write_base(folder / "target", 90, layers=1, hidden=32, head_dim=8, seed=1)
    # Of one width, for which one program is compiled.
    (folder / "prompts.txt").write_text("\n".join(f"{text} {n}" for n in range(3) for text in CORPUS[3:]))
    return folder, source, adapter


@pytest.fixture(scope="module")
def server(places):
    with serving(*places[1:]) as one:
        yield one


def run(*arguments):
    try:
        main(["transfer", *map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.full
def test_a_served_adapter_is_moved_by_the_command(places, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JCROSSLORA_SOURCE_KEY", "sk-this-is-a-secret")
    folder, source, _ = places
    asked = "--source-url", server.url, "--source-model", MODEL, "--source-tokenizer", source.path
    given = "--target", folder / "target", "--out", tmp_path / "moved", "--prompts", folder / "prompts.txt"
    assert run(*asked, *given, *FLAGS, "--dry-run") == 0
    assert "not estimated" in capsys.readouterr().out
    assert run(*asked, *given, *FLAGS) == 0
    assert "fit: the update was fitted in" in capsys.readouterr().out
    report = json.loads((tmp_path / "moved" / "transfer_report.json").read_text())
    assert report["source"]["name"] == BASE
    assert report["adapter"]["name"] == MODEL
    assert report["rank_before"] is report["effect"] is None
    assert report["asked"] == {"source_model": MODEL, "source_base_model": None, "source_tokenizer": "source"}
    assert "asked as my-lora over the OpenAI API, for the 20 likeliest tokens" in report["fit"]["note"]
    recipe = (tmp_path / "moved" / "recipe.toml").read_text()
    assert 'source_model = "my-lora"' in recipe
    command = "jcrosslora transfer --source-tokenizer PATH/source --target PATH/target --prompts PATH/prompts.txt"
    assert f"# {command} --source-url URL --recipe recipe.toml\n" in recipe
    assert "\nadapter =" not in recipe
    assert "\nsource =" not in recipe
    card = (tmp_path / "moved" / "README.md").read_text()
    assert "# `my-lora` moved to `target`" in card
    for path in (tmp_path / "moved").iterdir():
        content = path.read_bytes()
        assert not any(text.encode() in content for text in (server.url, "127.0.0.1", "sk-this", str(folder)))
    # The recipe asks the same again, from what is kept of the answers.
    sent = len(server.requests)
    recipe = tmp_path / "moved" / "recipe.toml"
    own = "--source-url", server.url, "--source-tokenizer", source.path
    again = "--target", folder / "target", "--out", tmp_path / "again", "--prompts", folder / "prompts.txt"
    assert run("--recipe", recipe, *own, *again, "--table", "none") == 0
    assert len(server.requests) - sent < 40  # with which a server is checked when it is opened, and at the end
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "moved" / weights).read_bytes()


@pytest.mark.full
def test_a_server_that_changes_the_adapter_in_the_middle_ends_the_move(places, server, monkeypatch):
    folder, source, _ = places

    @dataclass(frozen=True)
    class Changing(Distill):
        """A fit after which the server has another adapter."""

        name: ClassVar[str] = "changing"

        def move(self, task):
            found = super().move(task)
            monkeypatch.setattr(server, "sees", jax.tree.map(lambda x: 0.5 * x, server.sees))
            server.predict.cache_clear()
            return found

    served, prompts = jcl.ServedModel(server.url, MODEL, source.path), folder / "prompts.txt"
    try:
        with pytest.raises(SourceError, match="predicts otherwise than at the beginning"):
            jcl.transfer(None, served, folder / "target", Changing(**FIT), prompts=prompts, cache=False)
    finally:
        server.predict.cache_clear()


def test_torch_gives_the_update_that_our_decoder_gives(places, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr("jcrosslora.distill.run.fast_dtype", lambda: jnp.float32)
    folder, source, adapter = places
    target = jcl.open_base(folder / "target")
    prompts = (folder / "prompts.txt").read_text().splitlines()
    fit = Distill(**FIT, answer_temperature=0.0)
    found = jcl.transfer(folder / "adapter", jcl.TorchModel(source.path, device="cpu"), target, fit, prompts=prompts)
    wanted = distill(source, target, adapter, prompts=prompts, settings=fit)
    curve = [point.divergence for point in wanted.curve]
    assert [value for _, value in found.report.curve] == pytest.approx(curve, rel=0.02)
    assert curve[-1] < curve[0]
    assert found.report.rank_before == 4
    assert found.report.adapter.digest
    assert 'source_backend = "torch"' in (found.save(tmp_path / "moved") / "recipe.toml").read_text()


OWN = """
from pathlib import Path
Path({mark!r}).write_text("run")
from transformers import LlamaConfig as Own, LlamaForCausalLM as Model, LlamaTokenizer as Tokenizer
"""


def test_torch_does_not_run_code_in_the_folder_of_a_base(places, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # where transformers would ask
    folder, mark = places[0], tmp_path / "mark"
    classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}
    base = chat_base(tmp_path / "base").path
    config = json.loads((base / "config.json").read_text()) | {"model_type": "its-own", "auto_map": classes}
    (base / "config.json").write_text(json.dumps(config))
    tokens = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokens))
    (base / "own.py").write_text(OWN.format(mark=str(mark)))
    source = "--source", base, "--source-backend", "torch", "--source-tokenizer", base
    given = "--target", folder / "target", "--out", tmp_path / "moved", "--prompts", folder / "prompts.txt"
    assert run(folder / "adapter", *source, *given, *FLAGS) == 2
    said = capsys.readouterr().err
    assert f"{base}: its class is code in its own files, which is not run" in said
    assert len(said.splitlines()) == 1
    assert not mark.exists()


def test_torch_imports_no_module_that_an_adapter_names(places, tmp_path):
    pytest.importorskip("peft")
    folder, source, adapter = places
    jcl.save_adapter(adapter, tmp_path / "adapter", base=source, profile="peft")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"megatron_config": {"a": 1}, "megatron_core": "evil"}))
    model = jcl.TorchModel(source.path, device="cpu")
    with pytest.raises(AdapterError, match="names a Python module, 'evil', which is not imported"):
        jcl.transfer(tmp_path / "adapter", model, folder / "target", Distill(**FIT), prompts=CORPUS)


def copied(base, folder, **config):
    """Copy a base of one file, with other settings in its configuration."""
    shutil.copytree(base.path, folder)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | config))
    return folder


def test_torch_reads_no_pickle(places, tmp_path):
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("peft")
    folder, source, _ = places
    alone, named, both = (copied(source, tmp_path / name) for name in ("alone", "named", "both"))
    tensors = load_file(alone / "model.safetensors")
    for one, name in ((alone, "pytorch_model.bin"), (named, "part.bin")):
        (one / "model.safetensors").unlink()
        torch.save({name: torch.tensor(value) for name, value in tensors.items()}, one / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.bin")}
    (named / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(folder / "adapter", both, dirs_exist_ok=True)
    for base, why in (
        (alone, "only pickle files"),
        (named, r"'part.bin', which is not a \*.safetensors file"),
        (both, "holds adapter_config.json, an adapter"),
    ):
        with pytest.raises(jcl.CheckpointError, match=why):
            jcl.transfer(folder / "adapter", jcl.TorchModel(base, device="cpu"), folder / "target")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_torch_takes_no_package_for_attention_that_a_configuration_names(places, tmp_path, key):
    pytest.importorskip("peft")
    folder, source, _ = places
    base = copied(source, tmp_path / "base", **{key: "owner/kernel"})
    written = [
        TorchSource.open(jcl.TorchModel(one, device="cpu"), folder / "adapter").write(CORPUS, 4, 0.0, jax.random.key(0))
        for one in (base, source.path)
    ]
    assert written[0] == written[1]


def test_torch_names_no_package_for_attention_in_a_part_of_the_base(tmp_path):
    pytest.importorskip("peft")
    from wrapped_models import save_wrapped

    base = save_wrapped("gemma3", tmp_path)
    stated = json.loads((base / "config.json").read_text())
    for part in (stated, stated["text_config"], stated["vision_config"]):
        part["attn_implementation"] = "owner/kernel"
    (base / "config.json").write_text(json.dumps(stated))
    with quiet():
        config = load_base(base, None).config
    parts = config, config.text_config, config.vision_config
    assert all(part._attn_implementation in ("eager", "sdpa") for part in parts)


_ENDLESS = r"(\w+\.?)*!"


@pytest.mark.full
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": _ENDLESS},
        {"exclude_modules": _ENDLESS},
        {"modules_to_save": [_ENDLESS]},
        {"rank_pattern": {_ENDLESS: 2}},
        {"layers_to_transform": [0], "layers_pattern": _ENDLESS},
    ],
    ids=lambda config: [*config][-1],
)
def test_a_pattern_without_end_does_not_hang_peft(places, tmp_path, config):
    pytest.importorskip("peft")
    folder, source, _ = places
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(AdapterError, match=r"a pattern in adapter_config\.json takes more than"):
        TorchSource.open(jcl.TorchModel(source.path, device="cpu"), tmp_path / "adapter")


def test_a_pattern_of_many_parts_is_matched(places, tmp_path):
    """As unsloth writes for models of text and images."""
    pytest.importorskip("peft")
    folder, source, _ = places
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    projections = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    layers = rf"\bmodel\.layers\.[\d]{{1,}}\.(?:self_attn|attention|mlp)\.(?:(?:{projections}))"
    pattern = rf"(?:.*?(?:vision|image).*?(?:attn|mlp).*?(?:{projections}).*?)|(?:{layers})"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": pattern}))
    one, other = (
        TorchSource.open(jcl.TorchModel(source.path, device="cpu"), where).write(CORPUS, 4, 0.0, jax.random.key(0))
        for where in (tmp_path / "adapter", folder / "adapter")
    )
    assert one == other


@pytest.mark.full
def test_a_source_that_writes_its_own_prompts_is_searched_for_its_job(places, server, monkeypatch):
    """Every question of a fit is put to the server: both kinds of writing, scores and predictions."""
    monkeypatch.setattr(templates, "first_sentence", lambda _: " is said of it?")  # as a base that can speak writes
    for module in (completions, templates):  # fewer, for the sake of time
        monkeypatch.setattr(module, "templates_of", lambda tokenizer: templates_of(tokenizer)[-2:])
    monkeypatch.setattr(search, "KINDS", KINDS[:2])
    monkeypatch.setattr(search, "_TURNS", 1)
    source = ServedSource.open(jcl.ServedModel(server.url, MODEL, places[1].path))
    sampler = Sampler(FIT["completions"], FIT["answer_tokens"])
    found = completions.write_completions(source, source.alone(), sampler, 4)
    assert found.facts.answer_tokens == 4
    assert len(found.items) >= 16
    asked = {(body["model"], "echo" in body, body["max_tokens"]) for _, body in server.requests}
    assert {(BASE, True, 1), (MODEL, True, 1), (MODEL, False, 4)} <= asked
    assert any(model == BASE and not echo for model, echo, _ in asked)  # which writes the requests


@dataclass(frozen=True)
class Composed(Method):
    """A fit of one's own, which runs another one."""

    name: ClassVar[str] = "composed"
    requires: ClassVar[frozenset[jcl.EvidenceKind]] = Distill.requires

    def move(self, task):
        return Distill(**FIT).move(task)


@dataclass(frozen=True)
class Weighing(Composed):
    """A fit of one's own that reads weights after all."""

    name: ClassVar[str] = "weighing"

    def move(self, task):
        return super().move(dataclasses.replace(task, target=task.pair.source))


def test_a_fit_of_ones_own_asks_a_source(places, server):
    folder, source, _ = places
    served, prompts = jcl.ServedModel(server.url, MODEL, source.path), folder / "prompts.txt"
    found = jcl.transfer(None, served, folder / "target", Composed(), prompts=prompts)
    assert found.report.fit.steps > 0
    assert "asked as my-lora" in found.report.fit.note
    with pytest.raises(MethodError, match="method weighing needs the weights of the source"):
        jcl.transfer(None, served, folder / "target", Weighing(), prompts=prompts)


def test_what_needs_weights_is_refused(places, server):
    folder, source, _ = places
    served = jcl.ServedModel(server.url, MODEL, source.path)
    for method in ("cross-lora", "distilled-copy"):
        with pytest.raises(MethodError, match=f"method {method} needs the weights of the source.*--method distill"):
            jcl.transfer(None, served, folder / "target", method)
    for option in ({"scale": 2.0}, {"calibrate": "frobenius"}, {"effect": "always"}):
        with pytest.raises(UsageError, match="needs the adapter's weights"):
            jcl.transfer(None, served, folder / "target", **option)
    with pytest.raises(UsageError, match="with a served model, which has its own"):
        jcl.transfer(folder / "adapter", served, folder / "target")
    with pytest.raises(UsageError, match="a source on torch needs an adapter in files"):
        jcl.transfer(None, jcl.TorchModel(source.path), folder / "target")


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--source-model", "a"], "source_model is only for a source on a server"),
        (["--source-tokenizer", "a"], "source_tokenizer is only for a source on a server"),
        (["--source-backend", "torch", "--adapter-rank", "2"], "adapter_rank 2 is only for an adapter that is read"),
        (["--source-url", "http://h/v1"], "needs source_model: give it with --source-model"),
        (["--source-url", "http://h/v1", "--source-model", "a"], "needs source_tokenizer"),
        (["--source-url", "h", "--source-model", "a", "--source-tokenizer", "b"], "adapter adapter was given with"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(places, tmp_path, capsys, flags, wrong):
    folder, *_ = places
    ends = "adapter", "--source", folder / "source", "--target", folder / "target", "--out", tmp_path / "out"
    assert run(*ends, *flags) == 2
    assert wrong in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_where_the_server_fails(places, server, tmp_path, capsys):
    folder, source, _ = places
    asked = "--source-url", server.url, "--source-model", "other", "--source-tokenizer", source.path
    assert run(*asked, "--target", folder / "target", "--out", tmp_path / "out") == 2
    assert "has no model 'other'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert issubclass(SourceError, jcl.JCrossLoRAError)


def test_a_batch_refuses_sources_that_are_asked(places, tmp_path):
    folder, *_ = places
    plan = tmp_path / "plan.toml"
    bases = f'out = "out"\n[bases]\na = "{folder / "source"}"\nb = "{folder / "target"}"\n'
    adapters = f'[adapters]\na = ["{folder / "adapter"}"]\n'
    plan.write_text(bases + adapters + '[[moves]]\nfrom = "a"\nto = "b"\nsource_backend = "torch"\n')
    with pytest.raises(UsageError, match="move 1 sets source_backend, and a batch reads its sources itself"):
        jcl.read_plan(plan)


def test_an_adapter_of_other_modules_is_refused_by_torch(places, tmp_path):
    pytest.importorskip("peft")
    folder, source, _ = places
    other = jcl.open_base(write_base(tmp_path / "other", 30, layers=4, bos=True))
    jcl.save_adapter(random_adapter(other), tmp_path / "adapter", base=other, profile="peft")
    with pytest.raises(jcl.AdapterError, match=r"holds other modules than|PEFT cannot load it onto"):
        jcl.transfer(tmp_path / "adapter", jcl.TorchModel(source.path, device="cpu"), folder / "target")
    still = random_adapter(source, scale=0.0)
    jcl.save_adapter(still, tmp_path / "still", base=source, profile="peft")
    with pytest.raises(jcl.AdapterError, match="changes nothing in the predictions"):
        jcl.transfer(tmp_path / "still", jcl.TorchModel(source.path, device="cpu"), folder / "target")
