"""The commands and the Python of the README and of docs/ run as they are written, on tiny bases.

A page runs from top to bottom in one folder, where the names that the pages use are files: ADAPTER, SOURCE, TARGET and
so on. Options that a synopsis has in brackets are left out. What cannot run here is in `NOT_RUN`, with the reason.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from command_line import main
from probe_bases import CORPUS, QUESTIONS, write_move
from tiny_bases import random_adapter

import jcrosslora as jcl

pytestmark = pytest.mark.full

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
# Run in test_docs.py, and in test_jax_trainers.py.
ELSEWHERE = {
    "docs/adding-a-method.md",
    "docs/adding-a-family.md",
    "docs/formats-and-kinds.md",
    "docs/from-jax-trainers.md",
}
# The beginning of a command, and why it is not run.
NOT_RUN = {
    "git clone": "the network",
    "cd jcrosslora": "the clone",
    "python3 -m venv": "makes an environment",
    ". .venv": "makes an environment",
    ".venv/bin/": "makes an environment",
    "pip install": "makes an environment",
    "python ": "a script of the repository, which other tests run",
    "docker ": "needs Docker",
    "apptainer ": "needs Apptainer",
    "tensorboard ": "a server",
    "hf ": "the hub",
    "JCROSSLORA_SPACE_LOCAL": "a server",
    "jcrosslora push": "the hub",
    "jcrosslora demo": "fetches models; CI runs it",
    "jcrosslora COMMAND": "a synopsis of all commands",
    "jcrosslora --tyro": "writes into the user's folder",
    "jcrosslora transfer --source-url": "a server",
    "jcrosslora transfer ADAPTER --source BASE --source-backend torch": "torch; tests/test_asked_transfer.py runs it",
    "jcrosslora transfer ADAPTER --source QUANTISED_BASE": "a 4-bit base; tests/test_compensated_copy.py runs it",
    "jcrosslora transfer ...": "the end of another command",
    "jcrosslora evaluate --base BASE --tasks": "lm_eval; tests/test_evaluate_harness.py runs it",
    "jcrosslora evaluate --shelf": "a shelf by name",
    "jcrosslora generate --shelf": "a shelf by name",
    "jcrosslora shelf": "a shelf by name; tests/test_shelf.py runs these",
    "jcrosslora batch": "a plan with names of its own; tests/test_batch.py runs these",
    "jcrosslora cache": "the user's cache; tests/test_cache.py runs these",
}
PYTHON_NOT_RUN = {
    "jcl.push_to_hub": "the hub",
    "jcl.ServedModel": "a server",
    "jcl.Shelf": "an adapter with its completions; tests/test_shelf.py runs it",
    "shelf.compose": "the same",
}
PLAN = """
out = "batch"
[bases]
one = "SOURCE"
two = "TARGET"
[adapters]
one = ["ADAPTER"]
[[moves]]
from = "one"
to = ["two"]
methods = ["cross-lora"]
"""
QUICK = ["--completions", "16", "--passes", "1", "--fit-rank", "2", "--effect", "never", "--discovery", "0"]
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands_of(block: str) -> list[str]:
    """Split a block into commands; a line that ends in a backslash goes on."""
    lines = block.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def words_of(command: str) -> list[str]:
    """Split a command into words, without what a synopsis has in brackets."""
    without = re.sub(r"\[[^][]*(\[[^][]*\])?[^][]*\]| \.\.\.(?= |$)", "", command)
    return shlex.split(without, comments=True)


def test_a_block_is_split_into_commands_without_what_a_synopsis_leaves_open():
    block = "a b  # c\njcrosslora x A [A ...] [--y [--z N]] \\\n  --out 'D E'\nc && d\n"
    assert [words_of(one) for one in commands_of(block)] == [
        ["a", "b"],
        ["jcrosslora", "x", "A", "--out", "D E"],
        ["c"],
        ["d"],
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a file for each name of the pages."""
    folder = tmp_path_factory.mktemp("files")
    adapter, source, target = write_move(folder)
    for name in ("ADAPTER", "path/to/adapter", "path/to/one", "path/to/two", "json", "poems"):
        _copy(adapter, folder / name)
    for name in ("moved", "moved/json", "moved/poems", "trained"):
        jcl.save_adapter(random_adapter(jcl.open_base(target), seed=len(name)), folder / name, base_name="target")
    jcl.transfer(folder / "moved", target, source, "cross-lora", effect="never").save(folder / "DIR")
    for name in ("SOURCE", "BASE", "FULL_BASE", "DRAFT", "PATH", "path/to/source", "path/to/source-4bit"):
        _copy(source, folder / name)
    for name in ("TARGET", "COMPRESSED_BASE", "path/to/target", "path/to/target.gguf", "models/gemma-3-270m"):
        _copy(target, folder / name)
    jcl.merge(jcl.MergeSettings(str(source), str(adapter), str(folder / "FINETUNE")))
    _copy(folder / "FINETUNE", folder / "path/to/further-trained")
    texts = [f"{text} {number}" for number in range(4) for text in CORPUS[3:]]
    for name in ("prompts.txt", "PROMPTS.txt"):
        (folder / name).write_text("\n".join(texts))
    tasks = [dataclasses.asdict(question) for question in QUESTIONS]
    for name in ("questions.jsonl", "TRAIN.jsonl", "test.jsonl", "json.jsonl", "poems.jsonl"):
        (folder / name).write_text("".join(json.dumps(task) + "\n" for task in tasks))
    written = [{"prompt": question.prompt, "answer": question.choices[question.answer]} for question in QUESTIONS]
    for name in ("FILE.jsonl", "right.jsonl"):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in written))
    _copy(adapter, folder / "PATH/my-adapter")
    _copy(source, folder / "PATH/source.gguf")
    _copy(target, folder / "PATH/target")
    shutil.copy(folder / "prompts.txt", folder / "PATH/prompts.txt")
    (folder / "recipe.toml").write_text('method = "distill"\nseed = 1\nout = "from-recipe"\n')
    (folder / "plan.toml").write_text(PLAN)
    return folder


def _copy(folder: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, to)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_a_page_runs_as_it_is_written(page, files, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(files, tmp_path / "page"))
    monkeypatch.setattr(jcl, "transfer", _quick_transfer(jcl.transfer))
    source, target = jcl.open_base("SOURCE"), jcl.open_base("TARGET")
    names = {"jcl": jcl, "source": source, "target": target, "base": target, "adapters": ["moved/json", "moved/poems"]}
    for kind, block in _BLOCK.findall((ROOT / page).read_text()):
        if kind == "python" and not any(name in block for name in PYTHON_NOT_RUN):
            for out in re.findall(r"save\(\"([^\"]*)\"", block):
                shutil.rmtree(out, ignore_errors=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of peft about transformers
                exec(block, names)
        for command in commands_of(block) if kind == "sh" else ():
            if not any(command.startswith(beginning) for beginning in NOT_RUN):
                assert command.startswith("jcrosslora "), f"{page}: {command!r} is neither run nor in NOT_RUN"
                _run(words_of(command)[1:])


def _run(arguments: list[str]) -> None:
    """Run a command; what it makes anew replaces what the page made before."""
    if "--out" in arguments:
        out = arguments.index("--out") + 1
        if arguments[out] == "DIR":  # any folder
            arguments[out] = "new"
        shutil.rmtree(arguments[out], ignore_errors=True)
    if arguments[0] == "transfer" and "cross-lora" not in arguments:
        arguments = [*arguments, *QUICK]
    *arguments, to = [*arguments[:-2], arguments[-1]] if ">" in arguments else [*arguments, os.devnull]
    with open(to, "w", encoding="utf-8") as file, redirect_stdout(file):
        code = _code_of(arguments)
    assert not code, f"jcrosslora {shlex.join(arguments)} ended with {code}"


def _code_of(arguments: list[str]) -> object:
    try:
        main(arguments)
    except SystemExit as stopped:
        return stopped.code
    return 0


def _quick_transfer(transfer):
    """`transfer` with the settings of a short fit where none are given."""
    short = jcl.methods.Distill(completions=16, passes=1, fit_rank=2, discovery=0)

    def quick(adapter, source, target, method=None, prompts="prompts.txt", **options):
        return transfer(adapter, source, target, method or short, prompts=prompts, **options)

    return quick
