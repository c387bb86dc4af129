"""The main job on real input: an adapter of SmolLM2-135M-Instruct on Gemma-3-270M, loaded there by peft; the demo."""

import json
import re

import numpy as np
import pytest
from command_line import main
from real_models import real_models
from tiny_bases import delta
from transfers import transfer_settings

import jcrosslora as jcl
from jcrosslora import transfer_files
from jcrosslora.session.demo import GEMMA3, SOURCE_ADAPTER, shipped

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

from torch_model import torch_model  # noqa: E402

pytestmark = [
    pytest.mark.full,
    pytest.mark.real,
    # peft 0.21 asks transformers 5.24 by a name that the latter will drop.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    source, target = real_models()
    out = tmp_path_factory.mktemp("real") / "moved"
    with shipped(SOURCE_ADAPTER) as adapter:
        places = str(adapter), str(source), str(target), str(out)
        settings = transfer_settings(*places, method="cross-lora", target_id=GEMMA3.hub_id)
        result = transfer_files(settings)
    return result, out, target


@pytest.mark.slow
def test_peft_loads_it_on_the_real_target_and_merges_to_our_weights(moved):
    result, out, target = moved
    base = jcl.open_base(target)
    model = torch_model(base)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    merged = peft.PeftModel.from_pretrained(model, out).merge_and_unload()
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"{name}.weight" for name in result.adapter.modules}
    for name, factors in result.adapter.modules.items():
        got = (merged.get_submodule(name).weight - before[f"{name}.weight"]).detach().numpy()
        want = delta(factors)
        rounding = np.abs(before[f"{name}.weight"].numpy()).max() * np.finfo(np.float32).eps
        np.testing.assert_allclose(got, want, atol=2 * rounding + 1e-5 * np.abs(want).max())


def test_the_report_tells_the_truth_about_the_pair(moved):
    result, out, _ = moved
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == GEMMA3.hub_id
    report = result.report
    assert len(report.rows) == 36
    assert report.recipe.shared_tokens > 40_000
    # Independently trained models: single vectors agree no better than chance, and the verdict says so.
    assert jcl.verdict(report).level == "chance"
    for row in report.rows:
        assert 0.5 < row.vector_ratio < 2
        assert 0 < row.kept < 1
    left = {item.source.split(".")[2] for item in report.unmapped_sources}
    assert left == {"1", "3", "6", "8", "11", "13", "16", "18", "21", "23", "26", "28"}


def test_the_map_is_the_float64_one_up_to_rounding_and_signs():
    """One pair of modules against numpy's float64 SVD, with the signs taken from ours."""
    source, target = (jcl.open_base(path) for path in real_models())
    name = "model.layers.4.self_attn.q_proj"
    depth = [4 if layer == 4 else None for layer in range(18)]
    transport = jcl.align(source, target, "cross-lora", depth=depth, sources=[name])
    group = transport.groups[0]
    ((p_out, p_in),) = group.terms
    (u_s, _, vt_s), (u_t, _, vt_t) = (np.linalg.svd(np.float64(base.weight(name)), False) for base in (source, target))
    rank = p_out.left.shape[-1]
    inner = u_t[:, :rank].T @ np.asarray(p_out.left[0] @ p_out.right[0].T, np.float64) @ u_s[:, :rank]
    signs = np.sign(np.diag(inner))
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(len(u_s), 4)), rng.normal(size=(4, vt_s.shape[1]))
    want = (u_t[:, :rank] * signs) @ u_s[:, :rank].T @ b @ (a @ vt_s[:rank].T) @ (vt_t[:rank].T * signs).T
    got = np.asarray(p_out.left[0] @ (p_out.right[0].T @ b)) @ np.asarray(p_in.left[0] @ (p_in.right[0].T @ a.T)).T
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


@pytest.mark.slow
def test_the_demo_brings_the_job_to_the_target_and_the_controls_do_not(tmp_path, capsys):
    models = real_models()[0].parent
    main(["demo", "--out", str(tmp_path / "out"), "--models", str(models)])
    shown = capsys.readouterr().out
    rows = {}
    for line in shown.splitlines():
        if line.startswith("│"):
            name, nats, accuracy, json_share, lift = (cell.strip() for cell in line.strip("│").split("│"))
            rows[name] = float(nats), int(accuracy[:-1]), int(json_share[:-1]), float(re.match(r"\S+", lift)[0])
    base, moved, trained, random, paper = rows.values()
    assert base[2] == random[2] == paper[2] == 0
    assert moved[2] >= 80
    assert moved[3] > 0.6
    assert max(abs(random[3]), abs(paper[3])) < 0.1
    assert trained[2] >= 90
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == GEMMA3.hub_id
    )
