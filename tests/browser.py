"""Opens a page in Chromium, which PyQt6-WebEngine brings along, and tells what a reader would see of it.

    python browser.py PAGE.html WIDTH light|dark SCREENSHOT.png

prints figures as JSON; exit code 3 says on standard error why there is no browser.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NONE = 3
HEIGHT = 900
# Text outside of the window, or of a picture, that no box brings into view by scrolling; and the labels of each axis.
FIGURES = r"""
(() => {
  const scrolls = (one) => {
    for (let at = one; at && at !== document.documentElement; at = at.parentElement) {
      if (/auto|scroll/.test(getComputedStyle(at).overflowX)) return true;
    }
    return false;
  };
  const cut = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode, range = document.createRange();
    if (!node.data.trim() || node.parentElement.closest("style")) continue;
    range.selectNodeContents(node);
    const svg = node.parentElement.closest("svg");
    const frame = svg ? svg.getBoundingClientRect() : {left: 0, right: innerWidth};
    for (const box of range.getClientRects()) {
      const outside = box.left < frame.left - 1 || box.right > frame.right + 1;
      if (outside && (svg || !scrolls(node.parentElement))) cut.push(node.data.trim());
    }
  }
  for (const one of document.querySelectorAll("main *")) {
    const style = getComputedStyle(one);
    const hides = !one.closest("svg") && /hidden|clip/.test(style.overflowX);
    if (hides && one.scrollWidth > one.clientWidth) cut.push(one.outerHTML);
  }
  const axes = [...document.querySelectorAll('svg g[id*="matplotlib.axis"]')].map((axis) =>
    [...axis.querySelectorAll('g[id*="tick_"] text')].map((text) => {
      const box = text.getBoundingClientRect();
      return {text: text.textContent, box: [box.left, box.top, box.right, box.bottom]};
    }));
  const page = document.documentElement;
  return JSON.stringify({
    cut, axes, inner: innerWidth, width: page.scrollWidth, height: page.scrollHeight,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background: getComputedStyle(document.body).backgroundColor,
  });
})()
"""


def see(page: Path, width: int, theme: str, screenshot: Path) -> dict:
    """Open a page, take a screenshot of all of it, and return the figures; skip the test where no browser is there."""
    flags = "--disable-gpu" + (" --blink-settings=preferredColorScheme=0" if theme == "dark" else "")
    own = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1", "QTWEBENGINE_CHROMIUM_FLAGS": flags}
    command = [sys.executable, __file__, str(page), str(width), theme, str(screenshot)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, timeout=120)
    if found.returncode == NONE:
        pytest.skip(f"no browser, which PyQt6-WebEngine brings along: {found.stderr.splitlines()[-1]}")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def _run(page: str, width: str, _: str, screenshot: str) -> int:
    try:
        from PyQt6.QtCore import QTimer, QUrl
        from PyQt6.QtWebEngineWidgets import QWebEngineView
        from PyQt6.QtWidgets import QApplication
    except ImportError as error:
        print(error, file=sys.stderr)
        return NONE
    application = QApplication(sys.argv)
    view = QWebEngineView()
    view.resize(int(width), HEIGHT)

    def measured(found: str) -> None:
        print(found)
        view.resize(int(width), json.loads(found)["height"])
        QTimer.singleShot(1500, taken)

    def taken() -> None:
        view.grab().save(screenshot)
        application.exit(0)

    view.loadFinished.connect(lambda _: QTimer.singleShot(300, lambda: view.page().runJavaScript(FIGURES, measured)))
    view.load(QUrl.fromLocalFile(page))
    view.show()
    QTimer.singleShot(60_000, lambda: application.exit(1))
    return application.exec()


if __name__ == "__main__":
    sys.exit(_run(*sys.argv[1:]))
