"""Profile lora-xs: numpy's SVD of the base is the oracle for the kept energy, the reader for the written file."""

import dataclasses
import json
import tomllib

import numpy as np
import pytest
from command_line import main
from recording import recorded
from safetensors.numpy import load_file, save_file
from tiny_bases import delta, random_adapter, write_llama
from tiny_models import save_tiny
from transfers import transfer_settings

import jcrosslora as jcl
from jcrosslora import read_plan, run_batch, transfer_files
from jcrosslora.adapter import Adapter, LoRAFactors, frozen_factors, fuse, save_adapter, update_norm
from jcrosslora.checkpoint import describe_base
from jcrosslora.errors import CheckpointError, OutputError, UsageError
from jcrosslora.session.pair_session import PairSession
from jcrosslora.session.settings import TransferOptions

K = 30  # more than the 24 rows of k_proj and v_proj, less than the short side of any other
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, seed in (("source", 0), ("target", 1)):
        write_llama(folder / name, seed=seed, layers=2)
    save_tiny("phi3", folder / "phi3", num_hidden_layers=1)
    for name in ("source", "target", "phi3"):
        base = jcl.open_base(folder / name)
        jcl.save_adapter(random_adapter(base, scale=0.3), folder / f"{name}-adapter", base=base)
    return folder


def export(files, out, name="target", **changes) -> jcl.ExportSettings:
    adapter, base = str(files / f"{name}-adapter"), str(files / name)
    wanted = {"adapter": (adapter,), "out": str(out), "profile": "lora-xs", "base": base, "out_rank": K}
    return jcl.ExportSettings(**(wanted | changes))


def svd(base, name) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute U (O, K), S (K,) and V (I, K) of the stored weight by LAPACK in float64."""
    u, s, vt = np.linalg.svd(np.asarray(base.stored_weight(name), np.float64), full_matrices=False)
    return u[:, :K], s[:K], vt[:K].T


def projected(base, name, change: np.ndarray) -> np.ndarray:
    u, _, v = svd(base, name)
    return u @ u.T @ change @ v @ v.T


@pytest.mark.parametrize("name", ["target", "phi3"])
def test_the_projected_update_is_read_back_with_its_energy(files, tmp_path, name):
    done = jcl.export_adapter(export(files, tmp_path / "o", name))
    base, adapter = jcl.open_base(files / name), jcl.load_adapter(files / f"{name}-adapter")
    back = jcl.load_adapter(tmp_path / "o")
    assert back.info.kind == "LoRA-XS"
    wanted = fuse(adapter.modules, base.fused)
    assert back.modules.keys() == wanted.keys() == done.truncation.shares.keys()
    assert name != "phi3" or "model.layers.0.self_attn.qkv_proj" in back.modules
    left, whole = {}, {}
    for module, factors in wanted.items():
        inside = projected(base, module, delta(factors))
        np.testing.assert_allclose(delta(back.modules[module]), inside, rtol=0, atol=1e-4)
        np.testing.assert_allclose(delta(done.adapter.modules[module]), inside, rtol=0, atol=1e-4)
        u, _, v = svd(base, module)
        left[module] = np.linalg.norm(u.T @ delta(factors) @ v) ** 2
        whole[module] = np.linalg.norm(delta(factors)) ** 2
        assert done.truncation.shares[module] == pytest.approx(left[module] / whole[module], rel=1e-4)
    assert done.truncation.kept == pytest.approx(sum(left.values()) / sum(whole.values()), rel=1e-4)
    assert 0.1 < done.truncation.kept < 0.9
    assert done.truncation.least_kept == pytest.approx(min(done.truncation.shares.values()))


def test_an_update_in_the_span_is_kept_exactly(files, tmp_path):
    base, rng = jcl.open_base(files / "target"), np.random.default_rng(0)
    modules = {}
    for name in base.modules:
        u, _, v = svd(base, name)
        modules[name] = LoRAFactors(
            a=(rng.normal(size=(3, v.shape[1])) @ v.T).astype(np.float32),
            b=(u @ rng.normal(size=(u.shape[1], 3))).astype(np.float32),
            scale=0.7,
        )
    jcl.save_adapter(Adapter(modules), tmp_path / "a", base=base)
    done = jcl.export_adapter(export(files, tmp_path / "o", adapter=(str(tmp_path / "a"),)))
    assert done.truncation.least_kept == pytest.approx(1, abs=1e-5)
    for name, factors in jcl.load_adapter(tmp_path / "o").modules.items():
        error = np.linalg.norm(delta(factors) - delta(modules[name]))
        assert error < 1e-5 * np.linalg.norm(delta(modules[name]))


def test_the_file_equals_that_of_the_repository(files, tmp_path):
    """U, S V' and R have its names, and the configuration only keys that its peft (0.10) knows."""
    jcl.export_adapter(export(files, tmp_path / "o"))
    base, tensors = jcl.open_base(files / "target"), load_file(tmp_path / "o" / "adapter_model.safetensors")
    change = jcl.load_adapter(files / "target-adapter").modules
    assert len(tensors) == 3 * len(base.modules)
    for name in base.modules:
        a, b = (tensors[f"{PREFIX}{name}.lora_{side}.weight"] for side in "AB")
        r = tensors[f"{PREFIX}{name}_lora_latent_mapping.weight"]
        u, s, v = svd(base, name)
        top = len(s)  # fewer than K in narrow modules: the rest is zero
        assert (a.shape[0], b.shape[1], r.shape) == (K, K, (K, K))
        signs = np.sign(np.sum(b[:, :top] * u, axis=0))
        np.testing.assert_allclose(b[:, :top] * signs, u, rtol=0, atol=1e-3)
        np.testing.assert_allclose(a[:top] * signs[:, None], (v * s).T, rtol=0, atol=1e-3 * s[0])
        want = signs[:, None] * (u.T @ delta(change[name]) @ v / s) * signs
        np.testing.assert_allclose(r[:top, :top], want, rtol=0, atol=2e-3 * np.abs(want).max())
        assert not any(part.any() for part in (a[top:], b[:, top:], r[top:], r[:, top:]))
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == K
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config.keys().isdisjoint({"exclude_modules", "lora_bias"})


def test_an_update_in_the_span_loses_no_energy(files, tmp_path):
    done = jcl.export_adapter(export(files, tmp_path / "o", out_rank=48))
    back, wanted = (jcl.load_adapter(folder).modules for folder in (tmp_path / "o", files / "target-adapter"))
    for name, share in done.truncation.shares.items():
        whole = name.endswith(("q_proj", "o_proj"))  # square: both sides lie in the span
        assert (share > 1 - 1e-5) == whole
        assert back[name].rank == 48
        if whole:
            np.testing.assert_allclose(delta(back[name]), delta(wanted[name]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("dtype", "eps"), [("bfloat16", 2**-7), ("float16", 2**-10)])
def test_half_precision_loses_no_more_than_its_digits(files, tmp_path, dtype, eps):
    done = jcl.export_adapter(export(files, tmp_path / "o", dtype=dtype))
    for name, factors in jcl.load_adapter(tmp_path / "o").modules.items():
        wanted = delta(done.adapter.modules[name])
        assert np.linalg.norm(delta(factors) - wanted) < 3 * eps * np.linalg.norm(wanted)


def test_commands_report_the_kept_energy(files, tmp_path, capsys):
    given = ["--profile", "lora-xs", "--out-rank", str(K)]
    adapter, base = str(files / "target-adapter"), str(files / "target")
    main(["export", adapter, "--out", str(tmp_path / "e"), "--base", base, *given])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"truncation: the span of the top {K} singular vectors of each weight, which keeps ")
    ends = ["--source", str(files / "source"), "--target", base]
    way = [*ends, "--method", "pad-truncate", *given]
    main(["transfer", str(files / "source-adapter"), "--out", str(tmp_path / "t"), *way])
    assert f"truncation: the span of the top {K} singular vectors" in capsys.readouterr().out
    report = json.loads((tmp_path / "t" / "transfer_report.json").read_text())
    assert report["out_rank"] == K
    assert report["truncation"]["shares"].keys() == {row["target"] for row in report["rows"]}
    # The maps left the update as it was.
    whole, left = (sum(row[field] ** 2 for row in report["rows"]) for field in ("norm_before", "norm_after"))
    assert report["truncation"]["kept"] == pytest.approx(left / whole, rel=1e-4)
    assert "peft leaves out its R" in report["warnings"][-1]
    recipe = tomllib.loads(report["recipe_toml"])
    assert (recipe["profile"], recipe["out_rank"]) == ("lora-xs", K)
    assert "library_name: lora-xs\n" in (tmp_path / "t" / "README.md").read_text()
    (tmp_path / "again.toml").write_text(report["recipe_toml"])
    main(
        [
            "transfer",
            str(files / "source-adapter"),
            "--recipe",
            str(tmp_path / "again.toml"),
            *ends,  # the recipe names files, not where they are
            "--out",
            str(tmp_path / "u"),
        ]
    )
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "tu")
    assert one == two
    engines = {verdict.engine: verdict for verdict in jcl.check_engines(tmp_path / "t")}
    assert not any(verdict.reads for verdict in engines.values())
    assert "LoRA-XS's or BeamLoRA's own repository" in engines["PEFT"].reasons[0]


def lora_xs_settings(files, out, **changes) -> jcl.TransferSettings:
    names = {"adapter": "source-adapter", "source": "source", "target": "target"}
    paths = {key: str(files / name) for key, name in names.items()}
    wanted = {"method": "pad-truncate", "profile": "lora-xs", "out_rank": K}
    return transfer_settings(out=str(out), **(paths | wanted | changes))


def test_a_transfer_writes_what_it_says_it_moved(files, tmp_path):
    moved = transfer_files(lora_xs_settings(files, tmp_path / "o", calibrate="frobenius", target=str(files / "phi3")))
    base = jcl.open_base(files / "phi3")
    written, wanted = jcl.load_adapter(tmp_path / "o").modules, fuse(moved.adapter.modules, base.fused)
    assert written.keys() == wanted.keys()
    for name, factors in written.items():
        np.testing.assert_allclose(delta(factors), delta(wanted[name]), rtol=0, atol=1e-4)
    for row in moved.report.rows:
        assert (
            update_norm(moved.adapter.modules[row.target]) == pytest.approx(row.norm_after, rel=1e-4) != row.norm_before
        )


def test_the_target_is_decomposed_once_for_all_adapters(files):
    source, (target, store) = jcl.open_base(files / "source"), recorded(jcl.open_base(files / "target"))
    transport = jcl.align(source, target, "pad-truncate")
    store.read.clear()
    session, options = PairSession(source, target), TransferOptions(out_rank=K)
    for seed in range(2):
        move = session.start(random_adapter(source, seed=seed), transport.method, options, "lora-xs")
        session.finish_aligned(move, transport)
    assert sorted(store.read) == sorted(f"{name}.weight" for name in target.modules)


def test_a_batch_writes_what_a_transfer_writes(files, tmp_path):
    jcl.save_adapter(random_adapter(jcl.open_base(files / "source"), seed=5), tmp_path / "second")
    plan = f"""
out = "moved"
[bases]
source = "{files / "source"}"
target = "{files / "target"}"
[adapters]
source = ["{files / "source-adapter"}", "{tmp_path / "second"}"]
[[moves]]
from = "source"
to = "target"
methods = ["pad-truncate"]
profile = "lora-xs"
out_rank = {K}
"""
    (tmp_path / "plan.toml").write_text(plan)
    assert run_batch(read_plan(tmp_path / "plan.toml")).count("done") == 2
    transfer_files(lora_xs_settings(files, tmp_path / "o"))
    (found,) = (tmp_path / "moved").glob("source-adapter*/adapter_model.safetensors")
    want = load_file(tmp_path / "o" / "adapter_model.safetensors")
    for key, tensor in load_file(found).items():
        np.testing.assert_array_equal(tensor, want[key])


def test_adapters_that_cannot_be_written_are_refused(files, tmp_path):
    settings = export(files, tmp_path / "o")
    alora = dataclasses.replace(jcl.load_adapter(files / "target-adapter").info, invocation=(5, 7))
    jcl.save_adapter(Adapter(jcl.load_adapter(files / "target-adapter").modules, alora), tmp_path / "alora")
    refused = [
        ({"base": None}, OutputError, "needs the base model, whose singular vectors"),
        ({"out_rank": None}, UsageError, "without an out rank"),
        ({"out_rank": 0.99}, UsageError, "with out rank 0.99"),
        ({"out_rank": "auto"}, UsageError, "with out rank 'auto'"),
        ({"keep_dora": True, "out_rank": K}, UsageError, "--keep-dora"),
        ({"adapter": (str(tmp_path / "alora"),)}, OutputError, "LoRA-XS does not know"),
    ]
    for change, error, said in refused:
        with pytest.raises(error, match=said):
            jcl.export_adapter(dataclasses.replace(settings, **change))
    with pytest.raises(UsageError, match="without an out rank"):
        transfer_files(lora_xs_settings(files, tmp_path / "o", out_rank=None))
    base = jcl.open_base(files / "target")
    adapter, info = random_adapter(base), describe_base(base, digest="")
    one, two = (frozen_factors(base, adapter.modules, rank) for rank in (2, 3))
    first = next(iter(adapter.modules))
    for frozen, said in (
        (None, "frozen factors of the base"),
        ({}, "no frozen factors"),
        (one | {first: two[first]}, r"ranks \[2, 3\]"),
    ):
        with pytest.raises(OutputError, match=said):
            save_adapter(adapter, tmp_path / "o", base=info, profile="lora-xs", frozen=frozen)
    assert not (tmp_path / "o").exists()


def test_a_damaged_base_is_refused(files, tmp_path):
    write_llama(tmp_path / "base", seed=1, layers=2)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, path)
    base = jcl.open_base(tmp_path / "base")
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        frozen_factors(base, base.modules, 2)
