"""A plan done by four Ray workers gives what one process gives; what a worker dies of is retried, then listed."""

import json
import os
import sys
from pathlib import Path

import jax
import pytest
from command_line import main
from test_batch import results
from test_transfer import WIDER
from tiny_bases import random_adapter, write_llama
from transfers import transfer_settings

import jcrosslora as jcl
from jcrosslora.errors import UsageError
from jcrosslora.methods import allow_module
from jcrosslora.session.batch import Outcome, read_plan, run_batch, run_on_ray
from jcrosslora.session.batch.plan import Job, Unit
from jcrosslora.session.batch.ray_run import _division, _outcomes, _reach

PLAN = """
out = "OUT"
bases = { small = "small", wide = "wide" }
adapters = { small = ["adapters/*"] }
moves = [{ from = "small", to = ["wide"], methods = ["pad-truncate", "cross-lora"], svd_rank = 8 }]
"""


def test_resources_and_number_of_parallel_units():
    head, small, big = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 32.0, "GPU": 4.0, "memory": 1e9}
    assert _division([head, {"CPU": 16.0}], None, None) == ({"num_cpus": 4, "num_gpus": 0}, 5)
    # Where there are GPUs, units go to them.
    assert _division([head, small, big], None, None) == ({"num_cpus": 8, "num_gpus": 1}, 5)
    assert _division([head, small, big], 2, 0) == ({"num_cpus": 2, "num_gpus": 0}, 22)
    with pytest.raises(UsageError, match="no machine of the Ray cluster has 2 CPUs and 8 GPUs"):
        _division([small, big], 2, 8)
    for cpus, gpus in ((-1, None), (None, -0.5), (float("nan"), 0)):
        with pytest.raises(UsageError, match="give numbers from 0 on"):
            _division([small, big], cpus, gpus)


def test_error_without_ray_names_the_package_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    write_house(tmp_path)
    with pytest.raises(UsageError, match="pip install 'jcrosslora\\[ray\\]'"):
        run_on_ray(read_plan(tmp_path / "OUT.toml"), address="local")


def test_missing_cluster_is_refused_at_once():
    with pytest.raises(OSError, match="refused"):
        _reach("127.0.0.1:9")


def write_house(folder: Path, adapters: int = 1, name: str = "OUT"):
    """Two bases, adapters of the first, and a plan that writes to `name`."""
    if not (folder / "small").exists():
        write_llama(folder / "small", seed=0)
        write_llama(folder / "wide", seed=1, first_token=20, **WIDER)
        base = jcl.open_base(folder / "small")
        for number in range(adapters):
            adapter = random_adapter(base, seed=number, roles={"q_proj"})
            jcl.save_adapter(adapter, folder / "adapters" / f"a{number}", base_name="org/small")
    (folder / f"{name}.toml").write_text(PLAN.replace("OUT", name))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a cluster of four machines of one CPU each."""
    ray = pytest.importorskip("ray", reason="needs the extra: pip install 'jcrosslora[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # What the workers shall import and use: this checkout, its tests, and as many devices as here.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("JAX_NUM_CPU_DEVICES", str(jax.local_device_count()))
        patch.setenv("JCROSSLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        machine = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
        for _ in range(3):
            cluster.add_node(**machine)
        yield cluster.address
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_four_workers_and_one_process_write_equal_files(cluster, tmp_path, capsys):
    write_house(tmp_path, 3, "alone")
    write_house(tmp_path, name="moved")
    bad = tmp_path / "adapters" / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text("{")
    assert run_batch(read_plan(tmp_path / "alone.toml")).count("done") == 6
    with pytest.raises(SystemExit) as exit_info:
        main(["batch", str(tmp_path / "moved.toml"), "--ray", cluster])
    assert exit_info.value.code == 2
    assert "2 of 8 jobs failed" in capsys.readouterr().err
    assert results(tmp_path / "moved") == results(tmp_path / "alone")
    stated = json.loads((tmp_path / "moved" / "batch_summary.json").read_text())
    assert (stated["done"], stated["failed"], stated["open"]) == (6, 2, 0)
    assert {one["name"].split("--")[0] for one in stated["jobs"] if one["status"] == "failed"} == {"bad"}
    again = run_on_ray(read_plan(tmp_path / "moved.toml"), address=cluster)
    assert (again.count("kept"), again.count("failed")) == (6, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_job_killed_while_it_is_written_is_done_again(cluster, tmp_path):
    write_house(tmp_path, 8, "alone")
    plan = (tmp_path / "alone.toml").read_text().replace('["pad-truncate", "cross-lora"], svd_rank = 8', '["METHOD"]')
    allow_module("user_methods")
    for out, method in (("alone", "user_methods:HalfCopy"), ("moved", "user_methods:Killed")):
        (tmp_path / f"{out}.toml").write_text(plan.replace("alone", out).replace("METHOD", method))
    run_batch(read_plan(tmp_path / "alone.toml"))
    mark = Path(os.environ["JCROSSLORA_CACHE"]) / "killed"
    summary = run_on_ray(read_plan(tmp_path / "moved.toml"), address=cluster)
    assert mark.exists()
    # The other job of the killed worker's unit was done by then.
    statuses = {one.name[:2]: one.status for one in summary.outcomes.values()}
    assert statuses == {f"a{number}": "kept" if number == 0 else "done" for number in range(8)}
    assert sorted(path.name for path in (tmp_path / "moved").iterdir() if path.name[0] == ".") == [".batch"]
    whole = {name.split("--")[0]: found for name, found in weights(tmp_path / "alone").items()}
    assert {name.split("--")[0]: found for name, found in weights(tmp_path / "moved").items()} == whole
    assert len(whole) == 8
    again = run_on_ray(read_plan(tmp_path / "moved.toml"), address=cluster)
    assert again.count("kept") == 8


def weights(folder: Path) -> dict[str, bytes]:
    """The tensors of all adapters in a folder, without the header, which names their method."""
    return {
        path.parent.name: path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :]
        for path in folder.glob("*/adapter_model.safetensors")
    }


def deadly(unit: Unit, folder: Path, *_) -> list[Outcome]:
    """A worker's task that dies of one job always, and of another the first time."""
    for job in unit:
        first = folder / job.name
        if job.name == "always" or (job.name == "once" and not first.exists()):
            first.write_text("")
            os._exit(1)
    return [Outcome(job.name, job.settings.out, "done") for job in unit]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_unit_of_a_dead_worker_is_retried_and_the_fatal_job_listed(cluster, tmp_path):
    import ray

    def unit(*names):
        settings = transfer_settings(adapter="a", source="s", target="t", out="o")
        return tuple(Job(name, settings) for name in names)

    ray.init(address=cluster, log_to_driver=False)
    task = ray.remote(deadly).options(num_cpus=1, max_retries=1)
    units = [unit("once"), unit("good", "always", "better")]
    found = {outcome.name: outcome for outcome in _outcomes(ray, task, units, (tmp_path,))}
    ray.shutdown()
    assert {name: one.status for name, one in found.items()} == {
        **dict.fromkeys(["once", "good", "better"], "done"),
        "always": "failed",
    }
    assert "the worker died with it 2 times" in found["always"].text
