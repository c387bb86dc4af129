"""A page on which an adapter is moved: choose it and two bases, see what it takes, move it, read the report.

    python app.py

By default visitors name models of the hub or upload files, and no path of this machine is opened. From the environment:
JCROSSLORA_SPACE_LOCAL=1 for a page of your own: paths, your token and your cache count.
JCROSSLORA_SPACE_MINUTES: after how many minutes a job is stopped, 60 if not given.
"""

import asyncio
import json
import os
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default
from inputs import ADAPTER, DEMO, SOURCE, TARGET, Request, write_settings
from job import JobError, run_job
from rich.console import Console

import jcrosslora as jcl
from jcrosslora.session.demo import fetch_models
from jcrosslora.session.demo.run import COMPLETIONS

LOCAL = os.environ.get("JCROSSLORA_SPACE_LOCAL") == "1"
MINUTES = float(os.environ.get("JCROSSLORA_SPACE_MINUTES", "60"))
WAITING = 20  # jobs that may wait; one runs at a time
_LARGEST_UPLOAD = "8gb"
_HOUR = 3600
_CANCELLED = "cancelled: nothing of the job is kept"

_INTRODUCTION = """# Move a LoRA adapter to another base model
[jcrosslora](https://github.com/jcrosslora/jcrosslora) moves an adapter without its training data: the source model
writes text with it, and a LoRA for the target is trained on that text. The page is filled in with a small example,
whose move takes some minutes on a CPU. **Plan** says which method suits the two bases and what it takes, **Move** does
it. One job runs at a time; **Cancel** ends yours."""
_KINDS = {
    ADAPTER: "a hub id, or the files of a folder of PEFT or of mlx_lm, or one GGUF adapter",
    SOURCE: "the model it was trained on: a hub id, or config, tokenizer and safetensors, or one GGUF file",
    TARGET: "the model to move it to: a hub id, or config, tokenizer and safetensors, or one GGUF file",
}
_fetching = threading.Lock()


async def plan(*given: Any) -> AsyncGenerator[tuple[Any, ...]]:
    """Show what a transfer takes: progress, figures."""
    async with aclosing(_run("plan", _request(given), _show_plan, cleared=("",))) as running:
        async for shown in running:
            yield shown


async def move(*given: Any) -> AsyncGenerator[tuple[Any, ...]]:
    """Move an adapter: progress, report, file."""
    cleared = "", gr.DownloadButton(value=None, interactive=False, variant="secondary")
    async with aclosing(_run("move", _request(given), _show_result, cleared)) as running:
        async for shown in running:
            yield shown


async def _run(
    what: str, request: Request, show: Callable[[Path], tuple[Any, ...]], cleared: tuple[Any, ...]
) -> AsyncGenerator[tuple[Any, ...]]:
    """Run a job in a folder of its own, which is removed whatever happens; the first output tells of its progress.

    `cleared` are the other outputs without what an earlier job has shown.
    """
    rest = (gr.skip(),) * len(cleared)
    yield "starting", *cleared
    with tempfile.TemporaryDirectory(prefix="jcrosslora-job-") as name:
        folder = Path(name)
        try:
            bases = await asyncio.to_thread(_demo_bases) if request.needs_demo_bases() else None
            write_settings(request, folder, bases, local=LOCAL)
            async with aclosing(run_job(what, folder, minutes=MINUTES, local=LOCAL)) as job:
                async for line in job:
                    yield line, *rest
        except (JobError, jcl.JCrossLoRAError) as error:
            yield f"Error: {error}", *rest
            return
        except OSError as error:
            yield f"Error: the page cannot keep the files of the job ({error.strerror}): try again later", *rest
            return
        yield show(folder)


def _demo_bases() -> tuple[Path, Path]:
    """Fetch the demo's bases, once for all visitors: a job that is cancelled does not stop it."""
    with _fetching:
        return fetch_models(None, Console(quiet=True))


def _request(given: Sequence[Any]) -> Request:
    names, uploads, (method, completions, prompts) = given[:3], given[3:6], given[6:]
    return Request(
        names={what: name or "" for what, name in zip(DEMO, names, strict=True)},
        uploads={what: files or () for what, files in zip(DEMO, uploads, strict=True)},
        method=method,
        completions=int(completions),
        prompts=prompts or "",
    )


def _show_plan(folder: Path) -> tuple[Any, ...]:
    lines = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    listed = "".join(f"<div><b>{escape(name)}</b>: {escape(text)}</div>" for name, text in lines)
    return "planned", f"<h2>Plan</h2>{listed}"


def _show_result(folder: Path) -> tuple[Any, ...]:
    page = (folder / "report.html").read_text(encoding="utf-8")
    # The report holds texts that models wrote: in a frame without any rights it can do nothing to this page.
    frame = f'<iframe sandbox title="Report" srcdoc="{escape(page)}" style="width:100%;height:80vh;border:0"></iframe>'
    verdict = (folder / "verdict.txt").read_text(encoding="utf-8")
    download = gr.DownloadButton(value=str(folder / "moved.zip"), interactive=True, variant="primary")
    return f"moved: {verdict}", f"<h2>Report</h2>{frame}", download


def _buttons(*, busy: bool) -> tuple[gr.Button, gr.Button, gr.Button]:
    """Return Plan, Move and Cancel as they are while a job of the visitor's runs or waits, and while none does."""
    return (
        gr.Button("Plan", interactive=not busy),
        gr.Button("Move", interactive=not busy, variant="secondary" if busy else "primary"),
        gr.Button("Cancel", interactive=busy, variant="stop" if busy else "secondary"),
    )


def build() -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(title="Move a LoRA adapter", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as page:
        gr.Markdown(_INTRODUCTION)
        names, uploads = [], []
        with gr.Row():
            for what, kind in _KINDS.items():
                with gr.Column(min_width=260):
                    choices = gr.Dropdown(
                        [DEMO[what]], value=DEMO[what], label=what.capitalize(), info=kind, allow_custom_value=True
                    )
                    names.append(choices)
                    label = f"or the files of the {what}, in place of the name"
                    uploads.append(gr.File(label=label, file_count="multiple", height=150))
        prompts = gr.Textbox(
            label="Prompts of the adapter's own task, one a line, without answers",
            info="optional; nothing else helps as much, and twenty are enough to begin with",
            lines=3,
            max_lines=12,
        )
        with gr.Accordion("Settings", open=False):
            method = gr.Dropdown([jcl.methods.AUTO, *jcl.methods.METHODS], value=jcl.methods.AUTO, label="Method")
            completions = gr.Slider(
                minimum=32,
                maximum=600,
                value=COMPLETIONS,
                step=1,
                label="Completions",
                info="to which an update is fitted: more take longer and recover more; elsewhere 300 is the default",
            )
        with gr.Row():
            buttons = plan_button, move_button, cancel_button = _buttons(busy=False)
        progress = gr.Textbox(label="Progress", interactive=False, lines=2)
        planned = gr.HTML(elem_id="plan")
        download = gr.DownloadButton("Download the moved adapter", interactive=False)
        report = gr.HTML()
        given = [*names, *uploads, method, completions, prompts]
        shared: dict[str, Any] = {"concurrency_id": "jobs", "concurrency_limit": 1, "show_progress": "minimal"}
        at_once: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        running: list[Any] = []
        for button, job, shown in ((plan_button, plan, [planned]), (move_button, move, [report, download])):
            begun = button.click(partial(_buttons, busy=True), None, buttons, **at_once)
            running.append(begun.then(job, given, [progress, *shown], api_name=job.__name__, **shared))
            running[-1].then(partial(_buttons, busy=False), None, buttons, **at_once)
        cancel_button.click(
            lambda: (_CANCELLED, *_buttons(busy=False)), None, [progress, *buttons], cancels=running, **at_once
        )
    return page


if __name__ == "__main__":
    fonts = ["system-ui", "sans-serif"]  # no request to a font server
    theme = Default(font=fonts, font_mono=["monospace"])
    page = build().queue(max_size=WAITING)
    page.launch(theme=theme, ssr_mode=False, run_history=False, max_file_size=None if LOCAL else _LARGEST_UPLOAD)
