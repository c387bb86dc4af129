"""What a transfer would take: counted by the sizes of the bases and what is timed, without running anything else."""

import itertools
import json
import re
from dataclasses import dataclass

import pytest
from command_line import main
from probe_bases import CORPUS, write_move
from transfers import transfer_settings

import jcrosslora as jcl
from jcrosslora import Estimate, estimate_files
from jcrosslora.decoder import fast_dtype
from jcrosslora.decoder.loading import held_numbers
from jcrosslora.distill.batches import peak_bytes
from jcrosslora.errors import OutputError
from jcrosslora.methods import Distill, PadTruncate, Theseus
from jcrosslora.session.batch import estimate_batch, read_plan
from jcrosslora.session.estimate import PROCESS


@dataclass(frozen=True)
class Uncounted(PadTruncate):
    """A user's method with a stage of its own after the maps, whose cost is not known."""

    name = "uncounted"

    def move(self, task):
        return super().move(task)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of an adapter, its base and another base, and a place to write to."""
    folder = tmp_path_factory.mktemp("estimate")
    return [*write_move(folder, layers=3), folder / "out"]


@pytest.fixture(autouse=True)
def ticks(monkeypatch):
    """A clock by which everything that is timed takes one second; nothing has been timed yet."""
    clock = itertools.count()
    monkeypatch.setattr("jcrosslora.session.timing._CLOCK", clock.__next__)
    monkeypatch.setattr("jcrosslora.session.timing._KNOWN", {})
    return clock


def found(places, **settings):
    return estimate_files(transfer_settings(*places, **settings))


def test_each_decomposition_of_both_bases_counts(places):
    estimate = found(places, method="cross-lora")
    assert estimate.steps == {"align": 2 * estimate.modules}
    assert estimate.rank == 32  # the short side of the target's widest module
    assert (estimate.modules, estimate.seconds()) == (21, 42)


def test_maps_of_weights_alone_take_no_time_worth_naming(places):
    assert found(places, method="pad-truncate").steps == {"align": 0}
    assert found(places, method="pad-truncate").rank is None


def test_an_interpolation_decomposes_the_target_once(places):
    same = [places[0], places[1], places[1], places[3]]
    assert found(same, method="interpolated-copy").steps == {"align": 0, "interpolate": 14}


@pytest.mark.full
def test_distillation_has_the_steps_that_it_shows(places):
    assert list(found(places, method="distill").steps) == [
        "write completions",
        "fit",
        "measure the effect",
    ]
    assert list(found(places, method="distill", effect="never").steps) == ["write completions", "fit"]
    short = found(places, method="distill", effect="never").steps
    longer = found(places, method=Distill(completions=1200), effect="never").steps
    assert longer["write completions"] == pytest.approx(short["write completions"], rel=0.5)
    assert longer["fit"] > 2 * short["fit"]
    timed = found(places, method=Distill(budget="3h"), effect="never").steps
    assert timed["write completions"] + timed["fit"] == pytest.approx(3 * 3600, rel=0.01)
    late = found(places, method=Distill(budget="1s"), effect="never").steps
    assert late["fit"] == pytest.approx(short["fit"], rel=0.5)
    assert found(places, method=Distill(fit_rank=5)).rank == 5


def test_distillation_takes_longer_with_more_completions_and_less_with_given_prompts(places):
    texts = places[0].parent / "prompts.txt"
    texts.write_text("\n".join(CORPUS))
    few, many, given = (
        found(places, effect="never", **kind).steps
        for kind in (
            {"method": "distill", "completions": 150},
            {"method": "distill", "completions": 300},
            {"method": "distill", "completions": 150, "passes": 4, "prompts": str(texts)},
        )
    )
    assert many["write completions"] > 1.1 * few["write completions"] > 2 * given["write completions"]
    assert many["fit"] > 1.5 * few["fit"]
    assert given["fit"] == pytest.approx(few["fit"], rel=0.2)


def test_the_default_fit_takes_some_380_passes_forward_or_forward_and_back(places):
    # Four layers take a second; a pass of the source has 2 layers, of the target 3, beside their output heads.
    steps = found(places, method="distill", effect="never", compared_tokens=1).steps
    assert 320 < 4 * steps["fit"] / 2.6 < 430


def test_prompts_like_given_ones_are_counted_where_there_are_too_few(places, tmp_path):
    def writing(lines):
        (tmp_path / "prompts.txt").write_text("".join(f"{number} and {CORPUS[0]}\n" for number in range(lines)))
        steps = found(places, method="distill", prompts=str(tmp_path / "prompts.txt"), effect="never").steps
        return steps["write completions"] - 12

    enough, few, too_few = writing(300), writing(100), writing(7)
    # A written prompt takes as many tokens as an answer, behind some that are shown to the base.
    assert 1.5 * enough < few < 3 * enough
    assert too_few == enough


def test_memory_is_that_of_both_bases_where_they_run(places):
    bases = [jcl.open_base(place) for place in places[1:3]]
    runs = found(places, method="theseus")
    assert runs.memory >= 4 * sum(base.tensor(name).size for base in bases for name in base.store.names())


def test_maps_of_activations_count_a_decomposition_for_each_side_beside_the_passes_of_both_bases(places):
    once, twice = (found(places, method="theseus", effect="never", probe_count=count) for count in (96, 192))
    assert list(once.steps) == ["write", "align"]
    # Twice the text takes twice the passes; what remains are 12 s to compile, and the maps.
    maps = 2 * once.steps["align"] - twice.steps["align"] - 12
    src, tgt = ([module.shape for module in jcl.open_base(place).modules.values()][:7] for place in places[1:3])
    counted = 3 * sum(
        one * two * min(one, two) for sides in zip(src, tgt, strict=True) for one, two in zip(*sides, strict=True)
    )
    assert maps == pytest.approx(counted / 512**3, rel=1e-6)


def test_whitening_takes_longer(places):
    plain, whitened = (
        found(places, method=Theseus(whitening=share), effect="never").steps["align"] for share in (0.0, 0.25)
    )
    assert whitened > 1.5 * plain


def test_what_cannot_be_timed_is_said(places):
    estimate = found(places, method=Uncounted())
    assert estimate.steps == {"align": 0, "finish": None}
    assert dict(estimate.lines())["time"] == "over 0 s (align 0 s, finish not estimated)"
    checked = found(places, method=Uncounted(), effect="always")
    assert checked.time().startswith("over ")


def test_a_fit_counts_for_each_adapter_and_an_alignment_once():
    estimate = Estimate(Distill(), None, 10, 96, {"align": 100.0, "fit": 200.0, "measure the effect": None}, 0)
    assert (estimate.seconds(), estimate.seconds(3)) == (300, 700)
    assert estimate.time(3) == "over 12 min"


def test_the_same_sizes_are_timed_once(places, ticks):
    first, second = (found(places, method="distill") for _ in range(2))
    assert first == second
    # Of the source on whole texts and on one token each, of the target back as well, in one dtype; of both bases for
    # the check, in float32.
    assert next(ticks) in (2 * 3 * 4, 2 * 3 * 6)  # where the fastest dtype is float32, and where it is bfloat16


def test_a_dry_run_prints_the_estimate_and_writes_nothing(places, capsys):
    main(["transfer", str(places[0]), *flags(places), "--dry-run"])
    shown = capsys.readouterr().out
    assert re.search(r"^method +distill: .+$", shown, re.MULTILINE)
    assert re.search(r"^modules +21$", shown, re.MULTILINE)
    assert re.search(r"^rank +up to 16$", shown, re.MULTILINE)
    assert re.search(r"^time +.+ \(write completions .+, fit .+, measure the effect .+\)$", shown, re.MULTILINE)
    assert re.search(r"^memory +\d+\.\d\d GB$", shown, re.MULTILINE)
    assert not places[3].exists()


def test_a_dry_run_gives_its_figures_as_json(places, capsys):
    main(["transfer", str(places[0]), *flags(places), "--dry-run", "--json", "--method", "cross-lora"])
    record = json.loads(capsys.readouterr().out)
    assert record["seconds"] == sum(record["steps"].values())
    keys = {"method", "why", "modules", "rank", "examples", "steps", "seconds", "memory_bytes", "placement", "warnings"}
    assert keys == set(record)
    assert record["placement"] is None


def test_a_dry_run_refuses_what_the_transfer_would(places, tmp_path):
    (tmp_path / "note").write_text("x")
    with pytest.raises(OutputError):
        found([*places[:3], tmp_path])


def test_a_dry_run_refuses_settings_that_the_transfer_would(places, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["transfer", str(places[0]), *flags(places), "--dry-run", "--method", "distill", "--roles", "qproj"])
    assert stopped.value.code == 2
    wanted = "expected different roles of linear modules (did you mean 'q_proj'?), such as q_proj, k_proj"
    assert f"roles ('qproj',) was asked for, {wanted}" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["auto", "distill"])
def test_an_unknown_role_is_refused_before_a_base_is_looked_for(tmp_path, capsys, method):
    bases = ["--source", str(tmp_path / "none"), "--target", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["transfer", "none", *bases, "--method", method, "--roles", "q_proj", "up_prj"])
    error = capsys.readouterr().err
    assert "(did you mean 'up_proj'?)" in error
    assert len(error) < 300


def test_one_base_at_both_ends_is_called_so_before_the_work(places, capsys):
    same = [
        "--source",
        str(places[1]),
        "--target",
        str(places[1]),
        "--out",
        str(places[1].parent / "same"),
        "--dry-run",
    ]
    main(["transfer", str(places[0]), *same])
    reason = "source and target are one and the same base (equal digests), and nothing has to be moved"
    assert reason in capsys.readouterr().out
    main(["transfer", str(places[0]), *same, "--method", "cross-lora", "--json"])
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning == "source and target are one and the same base: nothing has to be moved"
    main(["compare", str(places[1]), str(places[1])])
    assert reason in " ".join(capsys.readouterr().out.split())


def test_the_memory_of_a_fit_is_that_of_weights_predictions_activations_and_factors(places):
    def memory(**settings):
        method = Distill(fit_rank=4, answer_tokens=64, compared_tokens=50, **settings)
        return found(places, method=method, effect="never").memory

    target, size = jcl.open_base(places[2]), 4
    weights = PROCESS + fast_dtype().itemsize * held(places[1], places[2])
    factors = 4 * size * sum(4 * sum(module.shape) for module in target.modules.values())
    remembered = size * 300 * 128 * 50  # 300 rows of 128 tokens, over 50 columns
    activations = memory() - weights - factors - remembered
    assert 0 < activations < 100e6
    assert memory(completions=150) == memory() - remembered // 2
    assert memory(roles=("q_proj",)) < memory() - factors // 2


def test_where_little_is_free_a_fit_is_to_keep_a_part_of_that(places):
    target = jcl.open_base(places[2])
    usual, little = (peak_bytes(target, Distill(), free) for free in (None, 1_000_000))
    factors = 4 * 4 * sum(min(16, *module.shape) * sum(module.shape) for module in target.modules.values())
    assert usual > 100e6
    assert little == factors + 500_000 + 250_000


def held(*places):
    return sum(held_numbers(jcl.open_base(place)) for place in places)


def test_a_plan_is_estimated_with_all_its_jobs(places, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'out="moved"\n[bases]\na="{places[1]}"\nb="{places[2]}"\n[adapters]\na=["{places[0]}"]\n'
        '[[moves]]\nfrom="a"\nto="b"\nmethods=["distill","cross-lora","copy"]\n'
    )
    fit, maps, refused = (one.record() for one in estimate_batch(read_plan(plan)))
    assert fit["steps"] == found(places, method="distill").steps
    assert maps["seconds"] == 42
    assert "cannot be moved" in refused["error"]


FEW = Distill(completions=24, answer_tokens=2, passes=1)


@pytest.mark.full
def test_a_transfer_shows_its_steps(places, every_line, capsys):
    jcl.transfer(*places[:3], FEW, prompts=CORPUS, cache=False)
    lines = capsys.readouterr().err.splitlines()
    for step in ("1 of 3: write completions", "2 of 3: fit", "3 of 3: measure the effect"):
        assert any(re.search(f"step {step}, .+, about .+ left", line) for line in lines), step


def test_a_shift_shows_the_steps_behind_the_maps(places, every_line, capsys):
    transport = jcl.align(*places[1:3], FEW)
    jcl.shift(transport, places[0], prompts=CORPUS, effect="always")
    lines = capsys.readouterr().err.splitlines()
    for step in ("1 of 3: write completions", "2 of 3: fit", "3 of 3: measure the effect"):
        assert any(re.search(f"step {step}, .+, about .+ left", line) for line in lines), step


def test_a_shift_of_maps_alone_has_no_steps(places, every_line, capsys):
    with jcl.show_progress(False):
        transport = jcl.align(*places[1:3], "pad-truncate")
    jcl.shift(transport, places[0])
    assert capsys.readouterr().err == ""


def flags(places):
    return ["--source", str(places[1]), "--target", str(places[2]), "--out", str(places[3])]
