"""No file that a command writes tells of the folders of a machine: each is searched for a telling name.

The inputs name folders as other programs write them: of this machine, and of the one that they were made on.
"""

import gzip
import json
import os
import zipfile
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from probe_bases import CORPUS, QUESTIONS, write_base
from safetensors.numpy import load_file, save_file
from test_push_to_hub import hub as hub  # a fixture
from test_push_to_hub import server as server
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.cli import cache, shelf
from jcrosslora.cli.main import COMMANDS, main
from jcrosslora.session.demo import run
from jcrosslora.session.demo.run import SOURCE_ADAPTER, TARGET_ADAPTER

# Of the HTTP library that the client of the hub uses.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAME = "telling-folder-of-ann"
# The base of each input, as the machine on which it was made wrote it.
MADE = {
    "adapter": f"/home/{NAME}/models/base",
    "other/adapter": f"/home/ann lee/{NAME}/base",
    "dora": f"file:///home/{NAME}/base",
    "own": f"C:\\models\\{NAME}\\source",
    "of-mlx": f"~/{NAME}/models/base",
    "of-gguf": f"\\\\server\\{NAME}\\base",
}
# As peft and transformers write it.
CARD = """---
base_model: {base}
library_name: peft
license: other
license_link: file://{folder}/LICENSE
tags:
- base_model:adapter:{base}
- lora
model-index: []
---

# adapter

A fine-tuned version of [{base}](https://huggingface.co/{base}), trained on `{folder}/data.jsonl` (see
https://example.org/a/b and {folder}/log.)
"""
WEIGHTS = "adapter_model.safetensors"
WRITE_NOTHING = {"inspect", "compare", "check", "methods", "generate", "cache list", "cache verify", "cache clear"}
WRITE_NOTHING |= {"shelf list", "shelf show", "shelf search", "shelf evaluate"}
FIT = "--completions 22 --passes 1 --fit-rank 2 --answer-tokens 4 --compared-tokens 300 --prompts prompts.txt"
PLACES = "--source source --target target"
# What runs in the telling folder; files by name are made absolute. Behind > stands what the user keeps of stdout.
LINES = f"""
train source --data answers.jsonl --out out/trained --steps 2 --rank 2 --template chat.jinja --log tensorboard
train target --data answers.jsonl --out out/tuned --steps 2 --rank 2 --checkpoints out/states
train source --data answers.jsonl --out out/started --steps 2 --start adapter
transfer adapter {PLACES} --out out/moved --method distill {FIT} --source-template chat.jinja
    --log tensorboard
transfer out/trained {PLACES} --out out/copied --method pad-truncate --effect always --profile peft --no-cache
transfer dora {PLACES} --out out/mlx --method cross-lora --svd-rank 4 --profile mlx --target-template chat.jinja
transfer adapter {PLACES} --out out/gguf --method theseus --prompts prompts.txt --profile gguf
transfer adapter {PLACES} --out out/recipe --recipe out/copied/recipe.toml --dtype bfloat16
transfer adapter {PLACES} --out out/pushed --method copy --table none --push-to me/moved
transfer of-mlx {PLACES} --out out/from-mlx --method copy --profile tunix
transfer of-gguf {PLACES} --out out/from-gguf --method copy --profile gguf
transfer other/adapter {PLACES} --out out/moved-again --method copy
export dora adapter --out out/sum --base source
export adapter --out out/adapter
export other/adapter --out out/other --profile peft
export dora --out out/kept --keep-dora --profile peft
export dora --out out/lost --out-rank 2 --base source
export own --out out/own
export of-mlx --out out/mlx-peft
export of-gguf --out out/gguf-mlx --base source --profile mlx
export adapter --out out/adapter-gguf --profile gguf --base source
export dora --out out/adapter-mlx --profile mlx --base source
export adapter --out out/adapter-tunix --profile tunix --base source
merge source adapter --out out/merged
merge source dora --out out/merged-half --dtype float16
extract out/merged --base source --out out/extracted --keep norms
export out/extracted --out out/absorbed --base source --absorb out/base
batch plan.toml --log tensorboard
push out/moved me/moved --with-completions
push out/adapter-gguf me/gguf
push adapter me/adapter
push own me/own
push of-mlx me/mlx
push out/adapter me/exported
evaluate --data answers.jsonl --base target --adapter out/moved out/copied --trained out/tuned --show 2 --json
    --html out/answers.html > out/moved/answers.json
evaluate --data choices.jsonl --base source --adapter adapter dora other/adapter --json > out/figures.json
report out/moved
report out/moved --answers out/moved/answers.json --out out/page.svg
shelf add out/shelf adapter out/trained --base source --prompts prompts.txt
shelf add out/shelf dora --name third
shelf add out/shelf other/adapter --name fourth
shelf remove out/shelf third
shelf train out/shelf --steps 1
evaluate --data choices.jsonl --shelf out/shelf --adapter dora other/adapter --json > out/shelf.json
demo --out out/demo --method pad-truncate
"""
PLAN = """
out = "out/batch"
bases = { source = "source", target = "target" }
adapters = { source = ["adapter", "dora", "bad"] }
moves = [{ from = "source", to = ["target"], methods = ["pad-truncate"] }]
"""


def lines() -> list[list[str]]:
    return [line.split() for line in LINES.replace("\n    ", " ").strip().splitlines()]


def test_every_command_is_run_or_writes_nothing():
    """A new command, or a new action of one, has to be put into `LINES`, or into `WRITE_NOTHING`."""
    actions = {"shelf": shelf.ACTIONS, "cache": cache.ACTIONS}
    every = set(COMMANDS) - actions.keys()
    every |= {f"{name} {action}" for name, found in actions.items() for action in found}
    ran = {" ".join(line[: 1 + (line[0] in actions)]) for line in lines()}
    assert ran | WRITE_NOTHING == every
    assert not ran & WRITE_NOTHING


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The telling folder with bases, adapters and texts. Nothing that is made there may say where it is."""
    home = tmp_path / NAME
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("JCROSSLORA_CACHE", str(tmp_path / "cache"))
    for seed, (name, merges) in enumerate((("source", 30), ("target", 60))):
        write_base(home / name, merges, bos=True, eos=1, layers=2, seed=seed)
    edit_json(home / "source" / "config.json", _name_or_path=str(home / "source"))
    tokenizer = {"name_or_path": str(home / "source"), "special_tokens_map_file": f"{MADE['adapter']}/tokens.json"}
    write_json(home / "source" / "tokenizer_config.json", {"eos_token": "</s>", **tokenizer})
    write_json(home / "source" / "generation_config.json", {"_from": {"_name_or_path": MADE["other/adapter"]}})
    write_json(home / "source" / "trainer_state.json", {"best_model_checkpoint": MADE["adapter"], "log_history": []})
    source = jcl.open_base(home / "source")
    for name in ("adapter", "other/adapter"):
        jcl.save_adapter(random_adapter(source, scale=0.3), home / name, base=source)
    write_dora(home / "adapter", home / "dora")
    for name in ("own", "bad"):
        jcl.save_adapter(random_adapter(source, scale=0.3), home / name, base_name="x")
    jcl.save_adapter(random_adapter(source, scale=0.3), home / "of-mlx", base=source, profile="mlx")
    mark = "b" * len(MADE["of-gguf"])
    jcl.save_adapter(random_adapter(source, scale=0.3), home / "of-gguf", base=source, base_name=mark, profile="gguf")
    for name, base in MADE.items():
        write_origin(home / name, base, mark)
    (home / "bad" / WEIGHTS).write_bytes(b"damaged")
    (home / "prompts.txt").write_text("\n".join(f"{text} {number}" for number in range(3) for text in CORPUS[3:]))
    (home / "plan.toml").write_text(PLAN)
    (home / "chat.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    write_lines(home / "answers.jsonl", [{"prompt": text, "answer": " Anna"} for text in CORPUS[3:6]])
    asked = [{"question": one.question, "choices": one.choices, "answer": one.answer} for one in QUESTIONS]
    write_lines(home / "choices.jsonl", asked)
    return home


def write_origin(folder: Path, base: str, mark: str) -> None:
    """Write into the files of an adapter where it was made: of the GGUF file, a base in the place of `mark`."""
    (folder / "README.md").write_text(CARD.format(base=base, folder=f"/mnt/{NAME}/runs"))
    if (weights := folder / "adapter.gguf").exists():
        stored = weights.read_bytes()
        assert mark.encode() in stored
        weights.write_bytes(stored.replace(mark.encode(), base.encode()))
    elif folder.name == "of-mlx":  # which writes all settings of its training
        edit_json(folder / "adapter_config.json", model=base, data=f"/mnt/{NAME}/data", adapter_path=f"./runs/{NAME}/a")
    else:
        mapped = {"base_model_class": "LlamaForCausalLM", "parent_library": f"/home/{NAME}/src/models.py"}
        edit_json(folder / "adapter_config.json", base_model_name_or_path=base, auto_mapping=mapped)
    if folder.parent.name == "other":  # itself moved
        record = {"recipe": {"method": "copy"}, "source": {"name": base}, "adapter": {"name": base, "base_name": base}}
        write_json(folder / "transfer_report.json", record | {"recipe_toml": f'source = "{base}"\n'})
        header = {f"jcrosslora.{name}": json.dumps(part) for name, part in record.items()}
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, header)


def write_dora(adapter: Path, out: Path) -> None:
    """Write an adapter as a DoRA, as peft does."""
    out.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    rows = {name: len(b) for name, b in tensors.items() if name.endswith(".lora_B.weight")}
    sizes = {name.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(count) for name, count in rows.items()}
    save_file(tensors | {name: one.astype(np.float32) for name, one in sizes.items()}, out / WEIGHTS, {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(out / "adapter_config.json", config | {"use_dora": True, "exclude_modules": None})


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data))


def edit_json(path: Path, **changed: object) -> None:
    write_json(path, json.loads(path.read_text()) | changed)


def write_lines(path: Path, entries: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


def run_line(line: list[str], home: Path) -> None:
    """Run a command with whole paths, as a script that others may read had them."""
    given = [str(home / part) if (home / part.partition("/")[0]).exists() else part for part in line]
    out = Path(os.devnull)
    if ">" in given:
        out = Path(given.pop())
        given.pop()
    with out.open("w", encoding="utf-8") as stream, redirect_stdout(stream):
        main(given)


def contents(path: Path):
    """Yield the bytes of a file, and of what is packed in it, with their names."""
    yield str(path), path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            yield from ((f"{path}: {name}", packed.read(name)) for name in packed.namelist())
    elif path.suffix == ".gz":
        yield f"{path}: unpacked", gzip.decompress(path.read_bytes())


@pytest.fixture
def demo(home, monkeypatch):
    """The demo with bases and adapters of the telling folder."""
    own = {SOURCE_ADAPTER: home / "adapter", TARGET_ADAPTER: home / "out" / "tuned"}
    monkeypatch.setattr(run, "fetch_models", lambda *_: (home / "source", home / "target"))
    monkeypatch.setattr(run, "shipped", lambda name: nullcontext(own[name]))
    monkeypatch.setattr(run, "demo_questions", lambda: QUESTIONS[:2])


@pytest.mark.full
def test_no_file_tells_of_the_folders_of_the_machine(home, demo, hub, capsys):
    before = set(home.rglob("*"))
    for line in lines():
        try:
            run_line(line, home)
        except SystemExit:
            said = capsys.readouterr().err
            assert "1 of 3 jobs failed" in said, f"{line}: {said}"  # whose reason is in the summary
    composed = jcl.compose(home / "source", [home / "adapter", home / "dora"], "gated")
    composed.save(home / "out" / "composed")
    jcl.compose(home / "source", [home / "adapter", home / "out" / "trained"]).save_adapter(home / "out" / "one")
    cache = [path for path in (home.parent / "cache").rglob("*") if "compiled" not in path.parts]
    written = [path for path in [*home.rglob("*"), *cache] if path.is_file() and path not in before]
    found = [pair for path in written for pair in contents(path)]
    found += [
        (f"hub: {repo_id}/{name}", data) for repo_id, repo in hub.repos.items() for name, data in repo.files.items()
    ]
    told = sorted(name for name, data in found if NAME.encode() in data)
    assert [name.removeprefix(str(home)) for name in told] == []
    assert len(found) > 60
    named = json.loads((home / "out" / "figures.json").read_text())["models"]
    assert [one["name"] for one in named] == ["source", "adapter", "dora", "adapter (2)"]
