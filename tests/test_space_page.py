"""The page of `examples/space` in a browser, served on loopback.

Run by `pytest -m slow`, with gradio and playwright, and the path of a headless Chromium in JCROSSLORA_BROWSER.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from probe_bases import write_move

import jcrosslora as jcl

pytestmark = pytest.mark.slow
APP = Path(__file__).parent.parent / "examples" / "space" / "app.py"
BROWSER = os.environ.get("JCROSSLORA_BROWSER")
WAIT = 300_000  # ms


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of an adapter and two bases, as they are uploaded."""
    folder = tmp_path_factory.mktemp("files")
    return {place.name: sorted(place.iterdir()) for place in write_move(folder)}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the page, and the folder in which its jobs have theirs."""
    pytest.importorskip("gradio")
    pytest.importorskip("matplotlib")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("served")
    own = {"TMPDIR": folder, "GRADIO_TEMP_DIR": folder / "gradio", "GRADIO_SERVER_PORT": port}
    own["PYTHONPATH"] = os.pathsep.join([str(Path(jcl.__file__).parent.parent), *sys.path])
    environment = os.environ | {name: str(value) for name, value in own.items()}
    with subprocess.Popen([sys.executable, str(APP)], env=environment) as process:
        try:
            address = f"http://127.0.0.1:{port}/"
            wait_for(lambda: answers(address))
            yield address, folder
        finally:
            process.terminate()


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def wait_for(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("JCROSSLORA_BROWSER names no browser")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visitor:
    """A visitor's page, with what went wrong on it."""

    def __init__(self, browser, address):
        self.page = browser.new_page(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
        self.page.set_default_timeout(WAIT)
        self.wrong = []
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        self.page.on("request", lambda request: self.wrong.append(request.url) if outside(request.url) else None)
        self.page.goto(address)
        self.page.get_by_role("button", name="Move", exact=True).wait_for()

    def upload(self, files):
        links, uploaded = self.page.locator("a[download]"), 0
        for place, name in enumerate(("adapter", "source", "target")):
            self.page.locator("input[type=file]").nth(place).set_input_files(files[name])
            uploaded += len(files[name])
            links.nth(uploaded - 1).wait_for(state="attached")

    def choose(self, label, value):
        chosen = self.page.get_by_label(label, exact=True)
        chosen.fill(value)
        chosen.press("Enter")

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def enabled(self, name):
        return self.page.get_by_role("button", name=name, exact=True).is_enabled()

    def shows(self, pattern):
        """Wait until the line of progress matches; return it."""
        found = []

        def matches():
            found.append(self.page.get_by_label("Progress").input_value())
            return re.match(pattern, found[-1])

        wait_for(matches, WAIT / 1000)
        return found[-1]


def outside(url):
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:", "about:"))


def jobs(folder):
    return list(folder.glob("jcrosslora-job-*"))


def test_a_visitor_plans_moves_and_downloads(served, browser, files, tmp_path):
    address, folder = served
    visitor = Visitor(browser, address)
    visitor.choose("Source", "/etc/passwd")
    visitor.press("Plan")
    assert visitor.shows("Error: ") == (
        "Error: the name of the source is '/etc/passwd', expected a hub id of the form owner/name: give one, or upload "
        "the files; paths are not opened here"
    )
    visitor.upload(files)
    visitor.page.get_by_text("Settings").first.click()
    visitor.choose("Method", "pad-truncate")
    visitor.press("Plan")
    visitor.shows("planned")
    assert visitor.page.locator("#plan h2").inner_text() == "Plan"
    assert "pad-truncate" in visitor.page.locator("#plan").inner_text()
    visitor.press("Move")
    visitor.shows("moved: ")
    report = visitor.page.frame_locator("iframe[title=Report]")
    assert "moved to target" in report.locator("h1").inner_text()
    with visitor.page.expect_download() as waiting:
        visitor.press("Download the moved adapter")
    waiting.value.save_as(tmp_path / "moved.zip")
    visitor.page.screenshot(path=tmp_path / "page.png", full_page=True)
    with zipfile.ZipFile(tmp_path / "moved.zip") as packed:
        packed.extractall(tmp_path)
    assert jcl.load_adapter(tmp_path / "moved", jcl.open_base(files["target"][0].parent)).modules
    assert not jobs(folder)
    assert not visitor.wrong


def test_a_job_is_cancelled_while_another_visitor_waits(served, browser, files):
    address, folder = served
    first, second = Visitor(browser, address), Visitor(browser, address)
    for visitor in (first, second):
        visitor.upload(files)
    assert not first.enabled("Cancel")
    first.press("Move")  # a fit of an update, which takes long
    first.shows("step ")
    assert (first.enabled("Move"), first.enabled("Cancel")) == (False, True)
    second.page.get_by_text("Settings").first.click()
    second.choose("Method", "pad-truncate")
    second.press("Move")
    second.press("Cancel")  # while it waits
    second.shows("cancelled: ")
    second.press("Move")
    assert len(jobs(folder)) == 1
    first.press("Cancel")
    first.shows("cancelled: ")
    second.shows("moved: ")
    assert not jobs(folder)
    assert first.page.get_by_label("Progress").input_value().startswith("cancelled")


def test_a_job_ends_when_its_page_is_closed(served, browser, files):
    address, folder = served
    visitor = Visitor(browser, address)
    visitor.upload(files)
    visitor.press("Move")
    visitor.shows("step ")
    visitor.page.close()
    wait_for(lambda: not jobs(folder))


def asked(address, source, files):
    """What the server says to a request that no page made."""
    given = ["x/adapter", source, "x/target", None, files, None, "auto", 100, ""]
    call = f"{address}gradio_api/call/plan"
    post = urllib.request.Request(call, json.dumps({"data": given}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(post) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}") as response:
        return response.read().decode()


def test_a_request_that_calls_a_file_of_the_host_an_upload_is_refused(served):
    address, folder = served
    said = asked(address, "/etc/passwd", None)
    assert "event: complete" in said
    assert "expected a hub id of the form owner/name" in said
    said = asked(address, "x/source", [{"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}])
    assert "event: error" in said
    assert "event: complete" not in said
    assert not jobs(folder)
