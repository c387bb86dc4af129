"""The page of `examples/space`: what a visitor may name, jobs in processes of their own, and the page in a browser.

For the tests in a browser (`-m slow`): `pip install gradio playwright`, and JCROSSLORA_BROWSER, the path of a headless
Chromium.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import inputs
import job
import pytest
import worker
from html_pages import Page
from inputs import ADAPTER, DEMO, SETTINGS, SOURCE, TARGET, Request, write_settings
from tiny_bases import random_adapter, write_llama
from transfers import transfer_settings

import jcrosslora as jcl

SPACE = Path(inputs.__file__).parent
PLACES = {ADAPTER: "org/adapter", SOURCE: "org/source", TARGET: "org/target"}
TELL = "import sys; print('jcrosslora: step 1 of 2', file=sys.stderr, flush=True)"
SLEEP = f"import subprocess; child = subprocess.Popen(['sleep', '600']); {TELL}; child.wait()"


def settings_of(folder, *, local=False, demo_bases=None, **request):
    """The settings that a request for `PLACES` leads to, some of it replaced."""
    names = PLACES | {what: request.pop(what) for what in PLACES if what in request}
    write_settings(Request(names, **request), folder, demo_bases, local=local)
    return json.loads((folder / SETTINGS).read_text())


def upload(folder, *names):
    """Files as the page keeps them when they have been uploaded."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return [str(folder / name) for name in names]


def worker_that(folder, monkeypatch, code):
    """Have jobs run `code`."""
    (folder / "worker_of_the_test.py").write_text(code)
    monkeypatch.setattr(job, "_WORKER", folder / "worker_of_the_test.py")


def follow(folder, monkeypatch, code, *, what="move", minutes=5.0, local=False, lines=None):
    """Run a job whose process runs `code`; return what it told, the first `lines` of it."""
    worker_that(folder, monkeypatch, code)
    monkeypatch.setattr(job, "_POLL", 0.05)

    async def told():
        found = []
        running = job.run_job(what, folder, minutes=minutes, local=local)
        async for line in running:
            found.append(line)
            if lines is not None and sum("step" in one for one in found) >= lines:
                await running.aclose()
        return found

    return asyncio.run(told())


def test_hub_ids_are_kept_and_the_cache_is_left_out(tmp_path):
    found = settings_of(tmp_path)
    assert found == PLACES | {"out": "moved", "cache": False, "method": "auto", "completions": 100}
    assert jcl.TransferSettings.of(**found).source == "org/source"


@pytest.mark.parametrize("name", ["/etc/passwd", "~/models/x", "../other/adapter", "models", "", "a/b/c", "org/x.gguf"])
@pytest.mark.parametrize("what", PLACES)
def test_a_path_of_the_machine_is_refused(tmp_path, what, name):
    with pytest.raises(jcl.UsageError, match=f"{what}.* expected a hub id of the form owner/name"):
        settings_of(tmp_path, **{what: name})
    assert not (tmp_path / SETTINGS).exists()


def test_a_path_is_taken_on_a_page_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    found = settings_of(tmp_path, local=True, source="org/here", target="models/x.gguf")
    assert found["source"] == str(tmp_path / "org" / "here")
    assert found["target"] == str(tmp_path / "models" / "x.gguf")
    assert (found["adapter"], found["cache"]) == ("org/adapter", True)


def test_uploaded_files_count_in_place_of_the_name(tmp_path):
    files = upload(tmp_path / "up", "adapter_config.json", "adapter_model.safetensors")
    base = upload(tmp_path / "up2", "base.gguf")
    folder = tmp_path / "job"
    folder.mkdir()
    found = settings_of(folder, uploads={ADAPTER: files, TARGET: base}, prompts="one\ntwo")
    assert (found["adapter"], found["target"], found["prompts"]) == ("adapter", "target/base.gguf", "prompts.txt")
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [Path(path).name for path in files]
    assert (folder / "prompts.txt").read_text() == "one\ntwo"


def test_two_uploads_of_one_name_are_refused(tmp_path):
    files = upload(tmp_path / "a", "config.json") + upload(tmp_path / "b", "config.json")
    with pytest.raises(jcl.UsageError, match=r"source has two files named config\.json"):
        settings_of(tmp_path, uploads={SOURCE: files})


def test_the_demo_fills_the_page(tmp_path):
    bases = tmp_path / "smol.gguf", tmp_path / "gemma.gguf"
    request = Request(DEMO)
    assert request.needs_demo_bases()
    assert not Request(PLACES).needs_demo_bases()
    write_settings(request, tmp_path, bases, local=False)
    found = json.loads((tmp_path / SETTINGS).read_text())
    assert (found["source"], found["target"]) == tuple(map(str, bases))
    assert found["target_id"] == "google/gemma-3-270m"
    assert found["answer_tokens"] == 16  # the answers of its adapter are short, which saves most of the time
    assert (Path(found["adapter"]) / "adapter_model.safetensors").is_file()


def test_a_method_is_looked_up_and_never_imported(tmp_path):
    with pytest.raises(jcl.MethodError, match="'inputs:Request' is unknown: choose one of auto, "):
        settings_of(tmp_path, method="inputs:Request")
    with pytest.raises(jcl.UsageError, match="completions is 100000: choose 1 to"):
        settings_of(tmp_path, completions=100_000)
    assert not {"completions", "answer_tokens"} & set(settings_of(tmp_path, method="cross-lora", adapter=DEMO[ADAPTER]))


def test_a_job_tells_what_it_does(tmp_path, monkeypatch):
    found = follow(tmp_path, monkeypatch, f"import time; time.sleep(1); {TELL}; time.sleep(0.5)")
    assert found[0].startswith("reading the files, ")
    assert found[-1] == "step 1 of 2"


def test_an_error_of_a_job_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(job.JobError, match=r"^source: no such folder$"):
        follow(tmp_path, monkeypatch, f"{TELL}; print('jcrosslora: source: no such folder', file=sys.stderr); exit(2)")
    with pytest.raises(job.JobError, match="most likely for lack of memory"):
        follow(tmp_path, monkeypatch, f"{TELL}; import os; os.kill(os.getpid(), 9)")
    with pytest.raises(job.JobError, match="exit code 1, which is a defect"):
        follow(tmp_path, monkeypatch, "1 / 0")
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_job_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    with pytest.raises(job.JobError, match=r"stopped after 0\.001 minutes"):
        follow(tmp_path, monkeypatch, SLEEP, minutes=0.001)
    assert all_end_in(tmp_path)


def test_a_cancelled_job_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    found = follow(tmp_path, monkeypatch, SLEEP, lines=1)
    assert found[-1] == "step 1 of 2"
    assert all_end_in(tmp_path)


def test_a_job_of_a_visitor_has_no_token_and_a_hub_folder_of_its_own(tmp_path, monkeypatch):
    secrets = {"HF_TOKEN": "hf_x", "HUGGING_FACE_HUB_TOKEN": "hf_x", "HF_HUB_CACHE": "/shared", "OPENAI_API_KEY": "k"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code = "import json, os; json.dump(dict(os.environ), open('env.json', 'w'))"
    follow(tmp_path, monkeypatch, code)
    own = json.loads((tmp_path / "env.json").read_text())
    assert not set(own) & set(secrets)
    assert (own["HF_HOME"], own["HF_ENDPOINT"]) == (str(tmp_path / "hub"), "http://127.0.0.1:9")
    follow(tmp_path, monkeypatch, code, local=True)
    assert json.loads((tmp_path / "env.json").read_text())["HF_TOKEN"] == "hf_x"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of an adapter and two bases."""
    folder = tmp_path_factory.mktemp("space")
    source = jcl.open_base(write_llama(folder / SOURCE))
    write_llama(folder / TARGET, seed=1, hidden=32, head_dim=8, layers=2)
    jcl.save_adapter(random_adapter(source), folder / ADAPTER, base_name="org/source")
    return folder


def test_the_worker_plans_and_moves(files, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jcrosslora.utils.progress.DISPLAY.log_every", 30.0)  # put back behind the test
    settings = transfer_settings(*(files / what for what in PLACES), "moved", method="pad-truncate", cache=False)
    worker.plan(settings)
    assert json.loads((tmp_path / "plan.json").read_text())[0] == ["method", "pad-truncate"]
    worker.move(settings)
    assert "script" not in Page((tmp_path / "report.html").read_text()).tags
    assert (tmp_path / "verdict.txt").read_text()
    with zipfile.ZipFile(tmp_path / "moved.zip") as packed:
        packed.extractall(tmp_path / "unpacked")
    assert jcl.load_adapter(tmp_path / "unpacked" / "moved", jcl.open_base(files / TARGET)).modules


def test_a_worker_ends_when_the_page_is_gone(files, tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    code = (
        "import sys, time, worker; worker.plan = lambda settings: (print(flush=True), time.sleep(600)); worker.main()"
    )
    (folder / SETTINGS).write_text(json.dumps({what: str(files / what) for what in PLACES} | {"out": "moved"}))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SPACE), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", code, "plan"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            process.stdout.readline()
            process.stdin.close()
            assert process.wait(60) == 1
        finally:
            process.kill()
    assert not folder.exists()


def test_the_card_of_the_space_is_valid():
    from huggingface_hub import RepoCard

    found = RepoCard.load(SPACE / "README.md", repo_type="space").data
    assert (found.sdk, found.app_file) == ("gradio", "app.py")
    assert found.license == "apache-2.0"
    assert (SPACE / found.app_file).is_file()


def all_end_in(folder: Path) -> bool:
    """Whether no process is left whose working folder is `folder`; one that was killed takes a moment to end."""
    end = time.monotonic() + 5
    while running_in(folder):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def running_in(folder: Path) -> list[int]:
    """Processes whose working folder is `folder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cwd").readlink() == folder:
                found.append(int(place.name))
        except OSError:
            continue
    return found
