"""The process of one job: plans a transfer or does it, in the folder that it is started in.

    python worker.py plan|move

Reads settings.json. `plan` writes plan.json, `move` report.html, verdict.txt and moved.zip. Lines that begin with
"jcrosslora: " on standard error tell of the progress; with exit code 2 the last one is the error.
"""

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import jcrosslora as jcl
from jcrosslora.utils.cache import keep_compiled
from jcrosslora.utils.cost import enough_memory
from jcrosslora.utils.progress import DISPLAY

USER_ERROR = 2


def plan(settings: jcl.TransferSettings) -> None:
    """Write what a transfer would take."""
    lines = list(jcl.estimate_files(settings).lines())
    Path("plan.json").write_text(json.dumps(lines), encoding="utf-8")


def move(settings: jcl.TransferSettings) -> None:
    """Move the adapter; write its page, its verdict, and its folder as a zip."""
    DISPLAY.log_every = 1
    jcl.show_progress()
    result = jcl.transfer_files(settings)
    Path("report.html").write_text(result.html(), encoding="utf-8")
    Path("verdict.txt").write_text(result.verdict.text, encoding="utf-8")
    shutil.make_archive("moved", "zip", base_dir=settings.out)


def main() -> int:
    """Do what the first argument names; return the exit code."""
    threading.Thread(target=_end_with_the_page, daemon=True).start()
    keep_compiled()
    try:
        with enough_memory():
            settings = jcl.TransferSettings.of(**json.loads(Path("settings.json").read_text(encoding="utf-8")))
            {"plan": plan, "move": move}[sys.argv[1]](settings)
    except jcl.JCrossLoRAError as error:
        print(f"jcrosslora: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def _end_with_the_page() -> None:
    """End when standard input is closed, as it is when the page's own process is killed; remove the job's folder."""
    while os.read(0, 1):
        pass
    shutil.rmtree(Path.cwd(), ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
