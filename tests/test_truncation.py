"""Truncated updates: numpy's best approximation is the oracle, for the values and for the reported energy."""

import json
import tomllib

import ml_dtypes
import numpy as np
import pytest
from command_line import main
from tiny_bases import delta, random_adapter, write_llama
from tiny_models import save_tiny

import jcrosslora as jcl
from jcrosslora import ExportSettings, export_adapter
from jcrosslora.adapter import Adapter, LoRAFactors, fuse, truncate_by_rule, update_norm
from jcrosslora.errors import AdapterError, UsageError
from jcrosslora.session.settings import read_table, setting_types

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def with_spectrum(values, rows=30, columns=20, seed=0, scale=1.0) -> LoRAFactors:
    """Make an update with these singular values from factors that are far from orthogonal."""
    rng, rank = np.random.default_rng(seed), len(values)
    u, v = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (rows, columns))
    mix = rng.normal(size=(rank, rank)) + 3 * np.eye(rank)
    b, a = u * values @ mix, np.linalg.solve(mix, v.T)
    return LoRAFactors(a=a.astype(np.float32), b=(b / scale).astype(np.float32), scale=scale)


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("rule", [1, 3, 0.9, 0.999, 1.0, "auto"])
def test_every_truncation_is_the_best_of_its_rank_with_its_energy_reported(rule):
    adapter = Adapter({Q: with_spectrum([8, 4, 2, 1, 0.5], scale=0.7), UP: with_spectrum([3, 2.5, 2, 0.01], seed=1)})
    found, cut = truncate_by_rule(adapter, rule)
    energies, lost = {}, {}
    for name, factors in adapter.modules.items():
        whole, left = delta(factors), delta(found.modules[name])
        assert found.modules[name].rank == cut.ranks[name] <= factors.rank
        np.testing.assert_allclose(left, best(whole, cut.ranks[name]), atol=2e-5)
        energies[name], lost[name] = np.sum(whole**2), np.sum((whole - left) ** 2)
    assert cut.kept == pytest.approx(1 - sum(lost.values()) / sum(energies.values()), abs=1e-6)
    shares = {name: 1 - lost[name] / energies[name] for name in lost}
    assert cut.shares == pytest.approx(shares, abs=1e-6)
    assert cut.least_kept == pytest.approx(min(shares.values()), abs=1e-6)
    assert shares[cut.least] == pytest.approx(cut.least_kept, abs=1e-6)


def test_a_share_of_the_energy_gives_each_module_the_lowest_rank_that_keeps_it():
    adapter = Adapter({Q: with_spectrum([8, 4, 2, 1, 0.5]), UP: with_spectrum([3, 3, 3, 0.01], seed=1)})
    # Energies 64, 16, 4, 1, 0.25 of 85.25, and 9, 9, 9 of 27.
    for share, ranks in ((0.7, (1, 3)), (0.9, (2, 3)), (0.98, (3, 3)), (0.99, (4, 3)), (0.6, (1, 2))):
        assert tuple(truncate_by_rule(adapter, share)[1].ranks.values()) == ranks


@pytest.mark.parametrize(("needed", "rank"), [(3, 8), (8, 8), (9, 16), (17, 32)])
def test_auto_takes_the_lowest_usual_rank_that_keeps_99_percent_of_every_module(needed, rank):
    many = with_spectrum([1.0] * needed + [1e-3] * (40 - needed), rows=50, columns=45)
    _, cut = truncate_by_rule(Adapter({Q: many, UP: with_spectrum([5, 1e-3] + [1e-4] * 8)}), "auto")
    assert cut.ranks[Q] == rank
    assert cut.ranks[UP] == min(rank, 10)
    assert cut.least_kept > 0.99


def test_low_ranks_keep_their_factors():
    adapter = Adapter({Q: with_spectrum([2, 1], scale=0.3)})
    for rule in (2, 8, 1.0, "auto"):
        found, cut = truncate_by_rule(adapter, rule)
        assert found.modules[Q] is adapter.modules[Q]
        assert cut.kept == pytest.approx(1, abs=1e-6)


def test_half_precision_and_zero_updates_are_truncated():
    half = with_spectrum([2, 1, 0.5])
    half = LoRAFactors(a=half.a.astype(ml_dtypes.bfloat16), b=half.b.astype(np.float16))
    zero = LoRAFactors(a=np.ones((3, 20), np.float32), b=np.zeros((30, 3), np.float32))
    found, cut = truncate_by_rule(Adapter({Q: half, UP: zero}), 0.99)
    np.testing.assert_allclose(delta(found.modules[Q]), best(delta(half), cut.ranks[Q]), atol=1e-4)
    assert cut.ranks[UP] == 1
    assert not np.asarray(found.modules[UP].b).any()


@pytest.mark.parametrize("rule", [0, -1, 0.0, 1.5, float("nan"), "many", True, None])
def test_invalid_rules_are_refused(rule):
    with pytest.raises(UsageError, match="out rank"):
        truncate_by_rule(Adapter({Q: with_spectrum([1])}), rule)


def test_settings_files_accept_every_rule_and_nothing_else():
    for rule in (8, 0.99, "auto"):
        read_table({"out_rank": rule}, setting_types(), "here")
    for rule in ("many", True, [8]):
        with pytest.raises(UsageError, match="it must be int or float or 'auto'"):
            read_table({"out_rank": rule}, setting_types(), "here")


# --- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    base = jcl.open_base(write_llama(folder / "base", layers=2))
    write_llama(folder / "target", seed=1, layers=2, hidden=64, heads=4, head_dim=16)
    for place in (0, 1):
        adapter = random_adapter(base, seed=place, scale=0.5, roles={"q_proj", "up_proj"})
        for name in (name for name in base.modules if name.endswith("q_proj")):
            adapter.modules[name].b[:, 2:] *= 0.01
        jcl.save_adapter(adapter, folder / f"adapter{place}", base_name="org/src")
    return folder


def test_a_transfer_reports_the_truncation_and_records_it_in_the_recipe(files, tmp_path, capsys):
    given = [str(files / "adapter0"), "--source", str(files / "base"), "--target", str(files / "target")]
    flags = ["--method", "pad-truncate", "--out-rank", "0.8", "--profile", "peft", "--no-cache"]
    main(["transfer", *given, *flags, "--out", str(tmp_path / "one")])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "one" / "transfer_report.json").read_text())
    assert f"keeps {report['truncation']['kept']:.2%} of the energy" in printed
    assert report["truncation"]["kept"] > report["truncation"]["least_kept"] >= 0.8
    card = (tmp_path / "one" / "README.md").read_text()
    assert "The update was truncated to ranks" in card
    written = jcl.load_adapter(tmp_path / "one").modules
    assert {name: factors.rank for name, factors in written.items()} == report["truncation"]["ranks"]
    assert len(set(report["truncation"]["ranks"].values())) > 1
    for row in report["rows"]:
        assert row["norm_after"] == pytest.approx(np.linalg.norm(delta(written[row["target"]])), rel=1e-5)
    assert tomllib.loads(report["recipe_toml"])["out_rank"] == 0.8


def copied(base, adapter: Adapter, rule, calibration=None) -> jcl.TransferResult:
    """A copy of an adapter on its own base, at the ranks that a rule gives."""
    return jcl.shift(jcl.align(base, base, "copy"), adapter, out_rank=rule, calibrate=calibration)


def test_truncation_keeps_the_norm_if_the_method_does(files):
    base, adapter = jcl.open_base(files / "base"), jcl.load_adapter(files / "adapter0")
    found = copied(base, adapter, 2, "frobenius")
    for row in found.report.rows:
        assert found.adapter.modules[row.target].rank == 2
        wanted = update_norm(adapter.modules[row.target])
        assert update_norm(found.adapter.modules[row.target]) == pytest.approx(wanted, rel=1e-4)
        assert row.norm_after == pytest.approx(wanted, rel=1e-4)


def test_fused_modules_are_truncated_as_one(tmp_path):
    base = jcl.open_base(save_tiny("phi3", tmp_path / "phi3", num_hidden_layers=1))
    adapter = random_adapter(base, rank=3, roles={"q_proj", "v_proj", "gate_proj", "up_proj"})
    found = copied(base, adapter, 4)
    assert found.adapter.modules.keys() == adapter.modules.keys()
    written = fuse(found.adapter.modules, base.fused)
    for name, factors in fuse(adapter.modules, base.fused).items():
        assert written[name].rank == 4
        np.testing.assert_allclose(delta(written[name]), best(delta(factors), 4), atol=2e-4)


def test_export_writes_the_sum_of_adapters_at_the_rank_it_needs(files, tmp_path):
    paths = tuple(str(files / f"adapter{place}") for place in (0, 1, 0))
    done = export_adapter(ExportSettings(paths, str(tmp_path / "o"), base=str(files / "base"), out_rank=0.999999))
    one, two = (jcl.load_adapter(path).modules for path in paths[:2])
    found = jcl.load_adapter(tmp_path / "o").modules
    for name, factors in found.items():
        assert factors.rank <= 8 < 12
        np.testing.assert_allclose(delta(factors), 2 * delta(one[name]) + delta(two[name]), atol=2e-3)
    assert done.truncation.kept > 0.99999
    narrow = Adapter({name: factors.replace(a=factors.a[:, 1:]) for name, factors in one.items()})
    jcl.save_adapter(narrow, tmp_path / "narrow")
    for base, named in ((None, "adapters of one base"), (str(files / "base"), "80 x 47")):
        with pytest.raises(AdapterError, match=named):
            export_adapter(ExportSettings((paths[0], str(tmp_path / "narrow")), str(tmp_path / "x"), base=base))
    assert not (tmp_path / "x").exists()


def test_the_export_command_copies_documents_and_reports_the_loss(files, tmp_path, capsys):
    jcl.save_adapter(jcl.load_adapter(files / "adapter0"), tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("# mine\n")
    main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "o"), "--profile", "mlx", "--out-rank", "3"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("truncation: rank 3, which keeps ")
    assert printed[-1] == f"written: {tmp_path / 'o'}"
    assert (tmp_path / "o" / "README.md").read_text() == "# mine\n"
    with pytest.raises(SystemExit) as caught:
        main(["export", "--out", str(tmp_path / "x")])
    assert caught.value.code == 2
    assert "no adapters" in capsys.readouterr().err
