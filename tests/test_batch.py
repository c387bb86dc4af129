"""Batches: what a plan means, that a pair is aligned once, and that nothing is lost or redone after a stop."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from full_set import full_except
from probe_bases import write_base
from rich.console import Console
from safetensors.numpy import load_file, save_file
from test_transfer import WIDER
from tiny_bases import delta, random_adapter, write_llama
from transfers import transfer_settings

import jcrosslora as jcl
import jcrosslora.session.batch.run as run_module
import jcrosslora.utils.digests as cache_keys
from jcrosslora.cli.main import main
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.methods import CrossLoRA, Distill
from jcrosslora.session.batch import print_estimates, read_plan, run_batch
from jcrosslora.session.batch.outcomes import stamp_of
from jcrosslora.session.batch.plan import Job, share_of, units_of
from jcrosslora.session.session import Session

PLAN = """
out = "moved"
[bases]
small = "small"
wide = { ref = "wide", id = "org/wide" }
twin = "twin"
[adapters]
small = ["adapters/*"]
[[moves]]
from = "small"
to = ["wide", "twin"]
methods = ["pad-truncate"]
[[moves]]
from = "small"
to = "wide"
methods = ["cross-lora"]
adapters = ["a0", "a2"]
svd_rank = 8
label = "r8"
"""


# Moves by a method that calls what a test puts into `hooks` after the maps of each adapter.
HOOKED = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="twin"\nmethods="user_methods:Hooked"\n'


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Three bases and four adapters of the first: two alike, one of another rank, one of fewer modules."""
    folder = tmp_path_factory.mktemp("house")
    write_llama(folder / "small", seed=0)
    write_llama(folder / "wide", seed=1, first_token=20, **WIDER)
    write_llama(folder / "twin", seed=0)
    base = jcl.open_base(folder / "small")
    kinds = [{}, {}, {"rank": 3}, {"roles": {"q_proj", "v_proj"}}]
    for number, kind in enumerate(kinds):
        adapter = random_adapter(base, seed=number, **kind)
        jcl.save_adapter(adapter, folder / "adapters" / f"a{number}", base_name="org/small")
    return folder


def plan_in(house, tmp_path, text=PLAN):
    """The plan, written to a folder of its own beside links to the bases."""
    for name in ("small", "wide", "twin", "adapters"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(house / name)
    (tmp_path / "plan.toml").write_text(text)
    return read_plan(tmp_path / "plan.toml")


def results(folder: Path) -> dict[str, bytes]:
    """The files of all adapters, without the record and the summary."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "/" in name and not name.startswith(".batch")}


@pytest.mark.full
def test_every_job_of_a_unit_shows_its_steps(house, tmp_path, every_line, hooks, capsys):
    hooks.append(lambda _: print("moved", file=sys.stderr))
    run_batch(plan_in(house, tmp_path, HOOKED + 'adapters=["a0", "a1"]\n'))
    lines = [line.removeprefix("jcrosslora: ") for line in capsys.readouterr().err.splitlines()]
    before = [lines[place - 1].rsplit(", ", 1)[0] for place, line in enumerate(lines) if line == "moved"]
    assert before == [f"batch, {done} of 2 jobs, step 2 of 2: finish" for done in range(2)]
    assert any(line.startswith("batch, 0 of 2 jobs, step 1 of 2: align, ") for line in lines)


def test_plan_expands_to_jobs_with_settings(house, tmp_path):
    plan = plan_in(house, tmp_path)
    names = [job.name for job in plan.jobs]
    plain = [f"a{number}--{target}--pad-truncate" for target in ("wide", "twin") for number in range(4)]
    assert names == [*plain, "a0--wide--cross-lora--r8", "a2--wide--cross-lora--r8"]
    last = plan.jobs[-1].settings
    assert (last.method, last.target_id) == (CrossLoRA(svd_rank=8), "org/wide")
    assert Path(last.out) == tmp_path / "moved" / names[-1]
    assert [len(unit) for unit in units_of(plan.jobs)] == [4, 4, 2]
    (tmp_path / "x.gguf").touch()
    found = plan_in(house, tmp_path, PLAN.replace('"adapters/*"', '"adapters/*", "*.gguf"')).jobs
    assert "x.gguf--wide--pad-truncate" in [job.name for job in found]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('out = "moved"', "", "has no out; give it text"),
        ("[bases]", "speed = 3\n[bases]", "unknown key 'wide'|unknown key 'speed'"),
        ('to = "wide"', 'to = "wider"', "names the base 'wider'"),
        ("svd_rank = 8", 'svd_rank = "8"', "sets svd_rank to '8'; it must be int"),
        ("svd_rank = 8", "ranks = 8", "unknown key 'ranks'"),
        ("svd_rank = 8", 'probe_text = "a"', "unknown key 'probe_text' .did you mean 'prompts'"),
        ("svd_rank = 8", "whitening = 0.1", "sets whitening, which none of its methods has: cross-lora"),
        ("svd_rank = 8", 'out = "x"', "sets out, which"),
        ('label = "r8"\n', 'label = ""\nmethods2 = 1\n', "unknown key 'methods2' .did you mean 'methods'"),
        ('"a0", "a2"', '"a9"', "no adapter of small is named a9"),
        ("adapters/*", "nothing/*", "no adapter matches nothing"),
        ("[[moves]]", 'smal = ["adapters/a1"]\n[[moves]]', "unknown key 'smal' .* it may have small, wide"),
        ('methods = ["cross-lora"]', 'methods = ["pad-truncate"]\nlabel = ""', "is made by two jobs|not TOML"),
        ("[[moves]]", "[[moved]]", "unknown key 'moved' .did you mean 'moves'"),
        ('from = "small"', 'from = "smal"', "names the base 'smal'"),
        ('from = "small"', "from = 3", "move 1 sets from to 3; it must be text"),
        ('ref = "wide", ', "", "base wide has no ref; give it a path or hub id"),
        ('"org/wide"', "3", "base wide sets id to 3; it must be text"),
        ('twin = "twin"', "twin = 3", "bases sets twin to 3; it must be a path or hub id, or { ref"),
        ('to = "wide"', "to = []", r"move 2 sets to to \[\]; it must be a list of names"),
        ('label = "r8"', "label = 8", "move 2 sets label to 8; it must be text"),
        ("svd_rank = 8", 'dtype = "int8"', "sets dtype to 'int8'; it must be 'float32', 'bfloat16', 'float16'"),
        ("svd_rank = 8", 'roles = "q_proj"', "sets roles to 'q_proj'; it must be a list of text"),
        (PLAN[PLAN.index("[[moves]]") :], "[moves]", "it must be at least one table"),
    ],
)
def test_invalid_plans_are_refused(house, tmp_path, old, new, message):
    assert old in PLAN
    with pytest.raises(UsageError, match=message):
        plan_in(house, tmp_path, PLAN.replace(old, new))


def test_settings_are_converted_to_their_types(house, tmp_path):
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="wide"\nmethods="distill"\nadapters="a0"\n'
    (job,) = plan_in(house, tmp_path, text + 'scale = 2\nroles = ["v_proj"]\n').jobs
    assert isinstance(job.settings.scale, float)
    assert job.settings.method == Distill(roles=("v_proj",))


def test_tilde_expands_to_home(house, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(house))
    text = PLAN.replace('"moved"', '"~/moved"').replace('"adapters/*"', '"~/adapters/*"')
    text = text.replace('"twin"\n', '"~/twin"\n')
    plan = plan_in(house, tmp_path, text)
    assert plan.out == house / "moved"
    assert Path(plan.jobs[0].settings.out) == plan.out / plan.jobs[0].name
    assert plan.jobs[0].settings.adapter == str(house / "adapters" / "a0")
    assert plan.jobs[4].settings.target == str(house / "twin")
    for old in ('"moved"', '"adapters/*"', '"twin"\n'):
        with pytest.raises(UsageError, match="no such home folder"):
            plan_in(house, tmp_path, PLAN.replace(old, '"~no-such-user/*"\n'))


def test_pattern_matches_hidden_folders_only_if_it_names_them(house, tmp_path):
    (tmp_path / "own" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "own" / "a0").symlink_to(house / "adapters" / "a0")
    (tmp_path / "plans").mkdir()
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="wide"\n'
    for pattern, name in (("../own/*", "a0"), ("../own/.*", ".ipynb_checkpoints"), (f"{tmp_path}/own/*", "a0")):
        (job,) = plan_in(house, tmp_path / "plans", text.replace("adapters/*", pattern)).jobs
        assert Path(job.settings.adapter).name == name


def test_a_folder_that_is_there_is_no_pattern(house, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "run[1]").symlink_to(house / "adapters" / "a0")
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="wide"\nmethods="copy"\n'
    (job,) = plan_in(house, tmp_path, text.replace("adapters/*", "own/run[1]")).jobs
    assert Path(job.settings.adapter) == tmp_path / "own" / "run[1]"


def test_duplicate_job_names_and_missing_plans_are_refused(house, tmp_path):
    text = PLAN.replace('svd_rank = 8\nlabel = "r8"\n', "")
    text = text.replace('methods = ["cross-lora"]', 'methods = ["pad-truncate"]')
    with pytest.raises(UsageError, match="a0--wide--pad-truncate is made by two jobs"):
        plan_in(house, tmp_path, text)
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(tmp_path / "none.toml")
    with pytest.raises(MethodError, match="move 2: method 'cross-lore' is unknown"):
        plan_in(house, tmp_path, PLAN.replace("cross-lora", "cross-lore"))


def test_two_adapters_of_the_same_name_are_refused(house, tmp_path):
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "final").symlink_to(house / "adapters" / "a0")
    text = PLAN.split("[[moves]]")[0].replace("adapters/*", "*/final") + '[[moves]]\nfrom="small"\nto="wide"\n'
    with pytest.raises(UsageError, match=r"two jobs, of .*first/final and .*second/final; rename one of the two"):
        plan_in(house, tmp_path, text)
    (tmp_path / "second-run").symlink_to(tmp_path / "second" / "final")
    plan = plan_in(house, tmp_path, text.replace('"*/final"', '"first/final", "second-run"'))
    assert [job.name for job in plan.jobs] == ["final--wide--auto", "second-run--wide--auto"]


def test_shards_together_have_every_job_once():
    def job(number, target):
        return Job(f"{target}{number}", transfer_settings(adapter="a", source="s", target=target, out="o"))

    jobs = [job(n, "x") for n in range(7)] + [job(n, "y") for n in range(2)] + [job(0, "z")]
    units = units_of(jobs)
    assert share_of(units, 1, 1) == units
    for count in (2, 3, 4, 20):
        shares = [share_of(units, index, count) for index in range(1, count + 1)]
        found = [one.name for share in shares for unit in share for one in unit]
        assert sorted(found) == sorted(one.name for one in jobs)
        assert max(sum(len(unit) for unit in share) for share in shares) <= -(-len(jobs) // count) + 1
    assert share_of([(jobs[0],)], 2, 2) == []
    for wrong in ((0, 2), (3, 2)):
        with pytest.raises(UsageError, match="does not exist"):
            share_of(units, *wrong)


@pytest.mark.full
def test_batch_equals_single_transfers(house, tmp_path):
    plan = plan_in(house, tmp_path)
    summary = run_batch(plan)
    assert summary.count("done") == len(plan.jobs) == 10
    for job in plan.jobs:
        single = jcl.transfer_files(dataclasses.replace(job.settings, out=str(tmp_path / "one" / job.name)))
        moved = jcl.load_adapter(job.settings.out)
        for name, factors in single.adapter.modules.items():
            np.testing.assert_allclose(delta(moved.modules[name]), delta(factors), atol=1e-5)
        assert json.loads((Path(job.settings.out) / "transfer_report.json").read_text())["verdict"]
    stated = json.loads((tmp_path / "moved" / "batch_summary.json").read_text())
    assert (stated["done"], stated["failed"]) == (10, 0)
    assert [one["name"] for one in stated["jobs"]] == [job.name for job in plan.jobs]

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "moved").rglob("*/*")}
    again = results(tmp_path / "moved")
    assert run_batch(plan).count("kept") == 10
    assert results(tmp_path / "moved") == again
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "moved").rglob("*/*")}


@dataclass(frozen=True)
class Counted(CrossLoRA):
    """cross-lora that writes down which weights it is given."""

    name: ClassVar[str] = "counted"
    seen: ClassVar[list[float]] = []

    def maps(self, evidence):
        jax.debug.callback(lambda first: self.seen.append(float(first)), evidence.src.weight[0, 0])
        return super().maps(evidence)


@pytest.mark.parametrize("room", full_except([1, 1 << 30], [1]))
def test_batch_aligns_each_pair_once(house, tmp_path, monkeypatch, room):
    """Whether every adapter is in a chunk of its own or all are in one."""
    monkeypatch.setenv("JCROSSLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_module, "CHUNK_BYTES", room)
    Counted.seen.clear()
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="wide"\nmethods="test_batch:Counted"\n'
    plan = plan_in(house, tmp_path, text)
    assert run_batch(plan).count("done") == 4
    jax.effects_barrier()
    target = jcl.open_base(house / "wide")
    assert len(set(Counted.seen)) == len(Counted.seen) == len(target.modules)
    assert run_batch(plan).count("kept") == 4
    jax.effects_barrier()
    assert len(Counted.seen) == len(target.modules)


@pytest.mark.parametrize(("room", "statuses"), [(1, ["done", "failed"]), (1 << 30, ["done", "done"])])
def test_adapters_are_read_once_while_they_fit_into_memory(house, tmp_path, monkeypatch, hooks, room, statuses):
    """The second adapter is gone when the first has been moved: there is no room to hold both, or it is not missed."""
    monkeypatch.setattr(run_module, "CHUNK_BYTES", room)
    plan_in(house, tmp_path)
    for name in ("a0", "a2"):
        shutil.copytree(house / "adapters" / name, tmp_path / "own" / name)
    text = PLAN.split("[[moves]]")[0].replace("adapters/*", "own/*")
    text += '[[moves]]\nfrom="small"\nto="wide"\nmethods="user_methods:Hooked"\n'
    hooks.append(lambda context: shutil.rmtree(tmp_path / "own", ignore_errors=True))
    found = run_batch(plan_in(house, tmp_path, text)).outcomes.values()
    assert [one.status for one in found] == statuses


def test_bad_adapter_fails_alone_and_is_listed(house, tmp_path, capsys):
    plan_in(house, tmp_path)
    (tmp_path / "adapters").unlink()
    for number in range(3):
        (tmp_path / "adapters").mkdir(exist_ok=True)
        (tmp_path / "adapters" / f"a{number}").symlink_to(house / "adapters" / f"a{number}")
    bad = tmp_path / "adapters" / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text("{")
    with pytest.raises(SystemExit) as exit_info:
        main(["batch", str(tmp_path / "plan.toml")])
    assert exit_info.value.code == 2
    shown = capsys.readouterr()
    assert "2 of 10 jobs failed" in shown.err
    stated = json.loads((tmp_path / "moved" / "batch_summary.json").read_text())
    failed = {one["name"]: one["text"] for one in stated["jobs"] if one["status"] == "failed"}
    assert failed.keys() == {"bad--wide--pad-truncate", "bad--twin--pad-truncate"}
    assert all("bad/adapter_config.json" in text and str(tmp_path) not in text for text in failed.values())
    assert {one["out"] for one in stated["jobs"]} == {one["name"] for one in stated["jobs"]}
    assert stated["done"] == 8


def test_finished_batch_is_recognised_without_reading_its_adapters(house, tmp_path, monkeypatch):
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="twin"\nmethods="copy"\nadapters="a[02]"\n'
    plan = plan_in(house, tmp_path, text)
    (tmp_path / "adapters").unlink()
    shutil.copytree(house / "adapters", tmp_path / "adapters")
    monkeypatch.setattr(cache_keys, "_TICK_NS", -1)  # files of this moment are as good as old ones
    assert run_batch(plan).count("done") == 2
    with monkeypatch.context() as patch:
        patch.setattr(Session, "load", lambda *_, **__: pytest.fail("an adapter is read"))
        assert run_batch(plan).count("kept") == 2
    weights = tmp_path / "adapters" / "a2" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + bytes(4))
    assert (run_batch(plan, overwrite=True).count("kept"), run_batch(plan).count("kept")) == (1, 2)
    monkeypatch.setattr(cache_keys, "_TICK_NS", 1 << 62)
    assert stamp_of(plan.jobs[0], "", "", "") is None


def test_resources_of_a_cluster_are_refused_without_one(house, tmp_path, capsys):
    plan_in(house, tmp_path)
    with pytest.raises(SystemExit):
        main(["batch", str(tmp_path / "plan.toml"), "--ray-cpus", "1"])
    assert "name it with --ray" in capsys.readouterr().err


def test_missing_base_fails_only_its_own_jobs(house, tmp_path):
    plan = plan_in(house, tmp_path, PLAN.replace('twin = "twin"', 'twin = "gone"'))
    summary = run_batch(plan)
    assert (summary.count("done"), summary.count("failed")) == (6, 4)
    assert all("gone" in one.text for one in summary.outcomes.values() if one.status == "failed")


def test_existing_folders_are_replaced_only_with_overwrite(house, tmp_path):
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="twin"\nmethods=["copy"]\nadapters="a0"\n'
    plan = plan_in(house, tmp_path, text)
    assert run_batch(plan).count("done") == 1
    changed = plan_in(house, tmp_path, text + "out_rank = 2\n")
    (outcome,) = run_batch(changed).outcomes.values()
    assert outcome.status == "failed"
    assert "exists already" in outcome.text
    assert next(iter(jcl.load_adapter(outcome.out).modules.values())).rank == 4
    assert run_batch(changed, overwrite=True).count("done") == 1
    assert next(iter(jcl.load_adapter(outcome.out).modules.values())).rank == 2
    assert run_batch(changed, overwrite=True).count("kept") == 1


def test_jobs_finished_by_another_run_meanwhile_are_kept(house, tmp_path, hooks):
    plan = plan_in(house, tmp_path, HOOKED + 'adapters="a0"\n')

    def run_another(context):
        hooks.clear()
        assert run_batch(plan).count("done") == 1

    hooks.append(run_another)
    (outcome,) = run_batch(plan).outcomes.values()
    assert (outcome.status, outcome.text) == ("kept", "")


def test_finished_jobs_are_kept_if_the_rest_of_their_unit_fails(house, tmp_path):
    """a3 has no module whose weights are damaged, a0 has."""
    write_llama(tmp_path / "wide", seed=1, first_token=20, **WIDER)
    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(tensors, tmp_path / "wide" / "model.safetensors")
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="wide"\nmethods="cross-lora"\nadapters=["a3"]\n'
    assert run_batch(plan_in(house, tmp_path, text)).count("done") == 1
    both = run_batch(plan_in(house, tmp_path, text.replace('["a3"]', '["a3", "a0"]'))).outcomes
    assert {one.name[:2]: one.status for one in both.values()} == {"a0": "failed", "a3": "kept"}


def test_adapter_with_unsuitable_modules_fails_alone(house, tmp_path):
    """The target has another MLP: a3 has no modules there, the others have."""
    write_llama(tmp_path / "twin", seed=1, intermediate=96)
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="twin"\nmethods="copy"\nadapters=["a0", "a3"]\n'
    first, second = run_batch(plan_in(house, tmp_path, text)).outcomes.values()
    assert (first.status, second.status) == ("failed", "done")
    assert "needs equal shapes" in first.text
    assert run_batch(plan_in(house, tmp_path, text)).count("kept") == 1


def test_unwritable_log_entry_fails_only_its_own_job(house, tmp_path):
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="twin"\nmethods="copy"\nadapters=["a0", "a1"]\n'
    assert run_batch(plan_in(house, tmp_path, text)).count("done") == 2
    record = tmp_path / "moved" / ".batch" / "a0--twin--copy.json"
    record.unlink()
    record.mkdir()
    first, second = run_batch(plan_in(house, tmp_path, text + "out_rank = 2\n"), overwrite=True).outcomes.values()
    assert (first.status, second.status) == ("failed", "done")
    assert ".batch: cannot be written" in first.text


def test_adapter_with_a_changed_configuration_is_moved_again(house, tmp_path):
    base = jcl.open_base(house / "small")
    adapter = jcl.save_adapter(random_adapter(base, roles={"q_proj"}), tmp_path / "adapters" / "a0", base=base)
    plan = plan_in(house, tmp_path, PLAN.split("[[moves]]")[0] + TWELVE.replace(', "random", "cross-lora"', ""))
    (outcome,) = run_batch(plan).outcomes.values()
    before = jcl.load_adapter(outcome.out).modules
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3 * config["r"]}))
    assert run_batch(plan, overwrite=True).count("done") == 1
    for name, factors in jcl.load_adapter(outcome.out).modules.items():
        np.testing.assert_allclose(delta(factors), 3 * delta(before[name]), rtol=1e-5, atol=1e-6)
    assert run_batch(plan).count("kept") == 1


def test_prompts_with_other_roles_move_an_adapter_again_and_another_path_of_the_plan_does_not(
    house, tmp_path, monkeypatch
):
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="wide"\nmethods="cross-lora"\nadapters="a0"\n'
    text += 'prompts="asked.jsonl"\n'
    lines = [json.dumps({"messages": [{"role": role, "content": "Say hello"}]}) for role in ("user", "system")]
    for place, line in enumerate([json.dumps({"prompt": "Say hello"}), *lines]):
        (tmp_path / "asked.jsonl").write_text(line)
        plan = plan_in(house, tmp_path, text)
        assert run_batch(plan, overwrite=place > 0).count("done") == 1
        assert run_batch(plan).count("kept") == 1
    monkeypatch.chdir(tmp_path)
    assert run_batch(read_plan("plan.toml")).count("kept") == 1


def test_a_changed_checkpoint_of_orbax_is_moved_again(house, tmp_path, monkeypatch):
    base = jcl.open_base(house / "small")
    (tmp_path / "adapters").mkdir()
    for name, seed in (("a0", 1), ("other", 2)):
        jcl.save_adapter(random_adapter(base, seed=seed), tmp_path / "adapters" / name, base=base, profile="tunix")
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="twin"\nmethods="copy"\n'
    plan = plan_in(house, tmp_path, text.replace("adapters/*", "adapters/a0"))
    monkeypatch.setattr(cache_keys, "_TICK_NS", -1)  # files of this moment are as good as old ones
    assert (run_batch(plan).count("done"), run_batch(plan).count("kept")) == (1, 1)
    other = tmp_path / "adapters" / "other"
    for path in other.rglob("*"):
        if path.is_file() and path.parent != other:  # files of the checkpoint, and not the configuration
            shutil.copyfile(path, tmp_path / "adapters" / "a0" / path.relative_to(other))
    assert run_batch(plan, overwrite=True).count("done") == 1


def test_base_with_a_later_added_tokenizer_is_moved_to_again(house, tmp_path):
    write_llama(tmp_path / "wide", seed=1, tokenizer=False, **WIDER)
    text = PLAN.split("[[moves]]")[0] + '[[moves]]\nfrom="small"\nto="wide"\nmethods="cross-lora"\nadapters="a0"\n'
    plan = plan_in(house, tmp_path, text)
    report = Path(plan.jobs[0].settings.out) / "transfer_report.json"
    assert run_batch(plan).count("done") == 1
    assert "no tokenizer.json" in report.read_text()
    assert run_batch(plan).count("kept") == 1
    shutil.copy(house / "wide" / "tokenizer.json", tmp_path / "wide")
    assert run_batch(plan, overwrite=True).count("done") == 1
    assert "no tokenizer.json" not in report.read_text()


@pytest.mark.parametrize("edited", ["adapters/a0/chat_template.jinja", "twin/chat_template.jinja", "given.jinja"])
def test_an_edited_chat_template_moves_an_adapter_again(house, tmp_path, edited):
    shutil.copytree(house / "adapters" / "a0", tmp_path / "adapters" / "a0")
    shutil.copytree(house / "twin", tmp_path / "twin")
    for name in ("adapters/a0/chat_template.jinja", "twin/chat_template.jinja", "given.jinja"):
        (tmp_path / name).write_text("{{ messages[0]['content'] }}")
    text = PLAN.split("[[moves]]")[0].replace('small = "small"', 'small = { ref = "small", template = "given.jinja" }')
    plan = plan_in(house, tmp_path, text + '[[moves]]\nfrom="small"\nto="twin"\nmethods="pad-truncate"\n')
    assert run_batch(plan).count("done") == 1
    assert run_batch(plan).count("kept") == 1
    (tmp_path / edited).write_text("[{{ messages[0]['content'] }}]")
    assert run_batch(plan, overwrite=True).count("done") == 1


@pytest.mark.full
def test_fitting_methods_run_adapter_by_adapter(tmp_path):
    write_base(tmp_path / "small", 30, bos=True, layers=2)
    write_base(tmp_path / "wide", 90, layers=2, hidden=32, head_dim=8, seed=1)
    base = jcl.open_base(tmp_path / "small")
    jcl.save_adapter(random_adapter(base, scale=0.3), tmp_path / "adapters" / "a0", base_name="x")
    lines = [
        f"{text} {number}" for text in ("Anna said that the water boils", "Peter has a dog") for number in range(8)
    ]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    head = 'out="moved"\n[bases]\nsmall="small"\nwide="wide"\n[adapters]\nsmall=["adapters/a0"]\n'
    move = '[[moves]]\nfrom="small"\nto="wide"\nmethods=["distill"]\nprompts="texts.txt"\neffect="never"\n'
    move += "completions=24\nanswer_tokens=2\npasses=1\n"
    (tmp_path / "plan.toml").write_text(head + move)
    (outcome,) = run_batch(read_plan(tmp_path / "plan.toml")).outcomes.values()
    assert outcome.status == "done", outcome.text
    moved = jcl.load_adapter(outcome.out)
    assert any(np.abs(factors.b).max() > 0 for factors in moved.modules.values())
    assert run_batch(read_plan(tmp_path / "plan.toml")).count("kept") == 1
    (tmp_path / "texts.txt").write_text("\n".join(reversed(lines)))
    summary = run_batch(read_plan(tmp_path / "plan.toml"))
    assert (summary.count("kept"), summary.count("failed")) == (0, 1)  # other texts; a folder is not overwritten
    assert run_batch(read_plan(tmp_path / "plan.toml"), overwrite=True).count("done") == 1
    (tmp_path / "texts.txt").unlink()
    (outcome,) = run_batch(read_plan(tmp_path / "plan.toml")).outcomes.values()
    assert "texts.txt: cannot be read" in outcome.text


def test_dry_run_estimates_and_writes_nothing(house, tmp_path, capsys):
    plan_in(house, tmp_path)
    main(["batch", str(tmp_path / "plan.toml"), "--dry-run"])
    shown = capsys.readouterr().out
    assert "cross-lora" in shown
    assert " GB" in shown
    assert not (tmp_path / "moved").exists()
    with pytest.raises(SystemExit):
        main(["batch", str(tmp_path / "plan.toml"), "--shard", "2"])
    assert "of the form i/n" in capsys.readouterr().err


def test_dry_run_distinguishes_unsuitable_modules_from_missing_bases(house, tmp_path):
    for plan, shown in (
        (PLAN.replace("pad-truncate", "copy"), "an adapter of all modules cannot be moved: "),
        (missing("gone"), "cannot be done: "),
    ):
        print_estimates(plan_in(house, tmp_path, plan), Console(width=400, file=(printed := io.StringIO())))
        assert f" {shown}" in printed.getvalue()


def missing(base: str) -> str:
    """A plan of one job, to a base that is not there."""
    text = PLAN.split("[[moves]]")[0].replace('twin = "twin"', f'twin = "{base}"')
    return text + '[[moves]]\nfrom="small"\nto="twin"\nmethods="copy"\nadapters="a0"\n'


def test_brackets_in_names_are_printed_literally(house, tmp_path, capsys):
    plan_in(house, tmp_path, missing("gone[v1]/[/x]"))
    main(["batch", str(tmp_path / "plan.toml"), "--dry-run"])
    assert "gone[v1]/[/x]:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["batch", str(tmp_path / "plan.toml")])
    assert stop.value.code == 2
    assert "gone[v1]/[/x]:" in capsys.readouterr().out


def test_long_names_are_wrapped_and_not_truncated(house, tmp_path):
    plan = plan_in(house, tmp_path, missing("b" * 90))
    for show in (lambda console: print_estimates(plan, console), run_batch(plan).print_to):
        show(Console(width=80, file=(printed := io.StringIO())))
        assert "…" not in printed.getvalue()
        assert printed.getvalue().count("b") >= 90


RESUMED = HOOKED.replace('to="twin"', 'to=["twin", "wide"]') + PLAN[PLAN.rindex("[[moves]]") :]


def raise_at(hooks, places, error):
    """Raise an error for the adapters whose places are named, counted from 1 over all runs."""
    count = iter(range(1, 100))

    def stop(context):
        if next(count) in places:
            raise error

    hooks.append(stop)


def test_interrupt_keeps_finished_jobs(house, tmp_path, hooks, capsys):
    plan_in(house, tmp_path, HOOKED)
    raise_at(hooks, {3}, KeyboardInterrupt)
    with pytest.raises(SystemExit) as exit_info:
        main(["batch", str(tmp_path / "plan.toml")])
    assert exit_info.value.code == 130
    assert "goes on from there" in capsys.readouterr().err
    stated = json.loads((tmp_path / "moved" / "batch_summary.json").read_text())
    assert (stated["done"], stated["open"]) == (2, 2)
    summary = run_batch(read_plan(tmp_path / "plan.toml"))
    assert (summary.count("kept"), summary.count("done")) == (2, 2)


# Killed at any point: outputs are those of an undisturbed run, byte by byte.

TWELVE = """
[[moves]]
from = "small"
to = "wide"
methods = ["pad-truncate", "random", "cross-lora"]
"""


def kill_and_resume(house, folder, times):
    """Run the plan of 12 jobs in processes that are killed after the given seconds, then to its end."""
    text = PLAN.split("[[moves]]")[0] + TWELVE
    plan = plan_in(house, folder, text)
    assert len(plan.jobs) == 12
    command = [sys.executable, "-m", "jcrosslora.cli.main", "batch", str(folder / "plan.toml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for seconds in times:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        child.wait()
        for path in (folder / "moved").glob("[!.]*"):
            if path.is_dir():
                jcl.load_adapter(path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return results(folder / "moved")


@pytest.mark.slow
def test_batch_killed_at_twenty_points_resumes(house, tmp_path):
    (tmp_path / "x").mkdir()
    started = time.monotonic()
    whole = kill_and_resume(house, tmp_path / "x", [])
    most = time.monotonic() - started
    rng = np.random.default_rng(0)
    (tmp_path / "x" / "moved").rename(tmp_path / "whole")
    assert kill_and_resume(house, tmp_path / "x", rng.uniform(0, 0.9 * most, 20)) == whole


def test_resumed_run_writes_the_same_bytes(house, tmp_path, hooks):
    plan = plan_in(house, tmp_path, RESUMED)
    run_batch(plan)
    whole = results(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "whole")
    raise_at(hooks, {2, 4, 9}, SystemError)
    for _ in range(3):
        with pytest.raises(SystemError):
            run_batch(plan)
    assert run_batch(plan).count("done") > 0
    assert results(tmp_path / "moved") == whole
