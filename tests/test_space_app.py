"""What the page of `examples/space` shows while a job runs, without a browser and with a stand-in for the job."""

import asyncio
import gc
import tempfile
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import job
import pytest
from html_pages import Page
from test_space import SLEEP, all_end_in, worker_that

pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@contextmanager
def unclosed_loops():
    """Let go of the event loops that gradio leaves open when it is imported, here and in no other test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        gc.collect()


@pytest.fixture(scope="module")
def page_module():
    with unclosed_loops():
        import app
    yield app
    with unclosed_loops():
        asyncio.set_event_loop(None)


@pytest.fixture
def app(page_module, tmp_path, monkeypatch):
    """The module of the page; its jobs have their folders below `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(job, "_POLL", 0.05)
    monkeypatch.setattr(page_module, "LOCAL", False)
    return page_module


def shown(handler, *, source="org/source", stop=None):
    """What the page shows while a handler runs; it is left as a cancelled one is when it shows `stop`."""

    async def collected():
        found = []
        running = handler("org/adapter", source, "org/target", None, None, None, "auto", 100, "")
        async for values in running:
            found.append(values)
            if values[0] == stop:
                await running.aclose()
        return found

    return asyncio.run(collected())


def test_the_page_has_a_plan_and_a_move_that_wait_for_each_other(app):
    config = app.build().config
    found = {one["api_name"]: one for one in config["dependencies"] if one["api_name"] in ("plan", "move")}
    assert set(found) == {"plan", "move"}
    cancelled = {number for one in config["dependencies"] for number in one["cancels"]}
    assert cancelled == {one["id"] for one in found.values()}


def test_cancel_waits_for_a_job_and_prompts_are_in_the_open(app):
    config = app.build().config
    props = {one["props"].get("value") or one["props"].get("label"): one["props"] for one in config["components"]}
    assert [(props[name]["interactive"], props[name]["variant"]) for name in ("Plan", "Move", "Cancel")] == [
        (True, "secondary"),
        (True, "primary"),
        (False, "secondary"),
    ]
    named = {one["id"]: str(one["props"].get("label")) for one in config["components"]}

    def inside(node):
        return [named[node["id"]], *(name for child in node.get("children") or [] for name in inside(child))]

    def accordions(node):
        found = [inside(node)] if named[node["id"]] == "Settings" else []
        return found + [one for child in node.get("children") or [] for one in accordions(child)]

    (settings,) = accordions(config["layout"] | {"id": next(iter(named))})
    assert "Method" in settings
    assert not any(label.startswith("Prompts") for label in settings)


def test_the_page_shows_a_report_without_rights_and_keeps_no_folder(app, tmp_path, monkeypatch):
    page, seen = '<h1 title="x">a report</h1><script>1</script>', []
    code = f"open('report.html', 'w').write({page!r}); open('verdict.txt', 'w').write('fine'); open('moved.zip', 'w')"
    worker_that(tmp_path, monkeypatch, code)
    monkeypatch.setattr(app.gr, "DownloadButton", lambda value, **_: seen.append(value and Path(value).is_file()))
    progress, frame, _ = shown(app.move)[-1]
    assert progress == "moved: fine"
    assert seen == [None, True]  # that of an earlier job goes first
    found = Page(frame)
    assert ("sandbox", None) in found.attributes
    assert ("srcdoc", page) in found.attributes
    assert found.tags == {"h2", "iframe"}
    assert not list(tmp_path.glob("jcrosslora-job-*"))


def test_an_error_is_a_line_on_the_page(app, tmp_path, monkeypatch):
    worker_that(tmp_path, monkeypatch, "exit('jcrosslora: no such model')")
    assert shown(app.plan, source="/etc/passwd")[-1][0].startswith("Error: the name of the source is '/etc/passwd'")
    monkeypatch.setattr(job, "_USER_ERROR", 1)
    assert shown(app.plan)[-1][0] == "Error: no such model"
    (tmp_path / "full").touch()
    monkeypatch.setattr(app, "write_settings", lambda *_, **__: (tmp_path / "full" / "x").write_text(""))
    assert shown(app.plan)[-1][0] == (
        "Error: the page cannot keep the files of the job (Not a directory): try again later"
    )
    assert not list(tmp_path.glob("jcrosslora-job-*"))


def test_a_cancelled_handler_leaves_neither_process_nor_folder(app, tmp_path, monkeypatch):
    worker_that(
        tmp_path, monkeypatch, f"open({str(tmp_path / 'cwd')!r}, 'w').write(__import__('os').getcwd()); {SLEEP}"
    )
    shown(app.move, stop="step 1 of 2")
    assert not list(tmp_path.glob("jcrosslora-job-*"))
    assert all_end_in(Path(f"{(tmp_path / 'cwd').read_text()} (deleted)"))
