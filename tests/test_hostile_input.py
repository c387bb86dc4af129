"""Hostile files: every reader returns a result or raises an error of ours, and neither runs nor changes anything.

`tools/fuzz_readers.py` does the same with very many cases, and watches memory and what is opened.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from adapter_folders import tensors, write_folder
from checkpoint_files import write_llama
from hostile_files import READERS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jcrosslora.adapter import load_adapter
from jcrosslora.adapter.names import is_matchable
from jcrosslora.checkpoint import load_tokenizer, open_base
from jcrosslora.errors import AdapterError, CheckpointError, JCrossLoRAError
from jcrosslora.utils.files import atomic_folder, write_whole

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", READERS)
@FEW
@given(st.integers(0, 1 << 40))
@example(120)  # a signalling NaN in the MLX adapter
def test_damaged_files_are_refused_in_one_line_or_read(name, tmp_path, seed):
    for path in tmp_path.iterdir():
        path.unlink()
    for file, content in READERS[name].damage(Random(seed)).items():
        (tmp_path / file).write_bytes(content)
    message = "one line"
    try:
        READERS[name].read(tmp_path)
    except JCrossLoRAError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 5000


def test_messages_are_one_printable_line():
    assert str(CheckpointError("a\nb\x1b[2J\u2028\ud800é")) == r"a\nb\x1b[2J\u2028\ud800é"
    assert len(str(CheckpointError("x" * 100_000))) < 5000


CODE = "from pathlib import Path\nPath({mark!r}).write_text('run')\nclass Own:\n    pass\n"


def test_code_in_a_model_folder_is_not_run(tmp_path: Path):
    mark = tmp_path / "mark"
    folder = write_llama(
        tmp_path / "base", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, trust_remote_code=...
    )
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    words = {f"w{index}": index for index in range(10)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"})
    )
    base = open_base(folder)
    base.weight("model.layers.0.mlp.up_proj")
    base.vocabulary()
    load_tokenizer(base)
    assert not mark.exists()


def test_a_config_cannot_ask_for_remote_code(tmp_path: Path):
    with pytest.raises(CheckpointError, match="'trust_remote_code'=True is not known"):
        open_base(write_llama(tmp_path, trust_remote_code=True))


def test_links_out_of_the_folder_are_replaced_and_not_followed(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    link = tmp_path / "settings.json"
    link.symlink_to(outside / "precious")
    write_whole(link, b"new")
    assert link.read_bytes() == b"new"
    assert not link.is_symlink()
    # The replaced adapter holds a link to a file and a dangling link.
    folder = write_folder(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(outside / "precious")
    (folder / "README.md").symlink_to(outside / "absent")
    with atomic_folder(folder, overwrite=True) as work:
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            (work / name).write_text("new")
    assert sorted(path.name for path in folder.iterdir() if not path.is_symlink()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "precious"


CHEAP = (
    "q_proj",
    r"^model\.layers\.11\.mlp",
    r".*\.layers\.(0|1|2)\.(q|k|v)_proj",
    r"layers\.[0-9]+\..*_proj",
    "(?:q|v)_proj",
)
COSTLY = (
    "(a+)+",
    "(a|a)*b",
    "(",
    "a{2,}" * 5,
    ".*" * 20,
    "a?" * 30 + "a" * 30,
    "(a|a|a|a)" * 12,
    "(.*x){9}",
    "a" + "(" * 5000,
)


def test_patterns_that_take_for_ever_are_refused():
    assert all(map(is_matchable, CHEAP))
    assert not any(map(is_matchable, COSTLY))


@pytest.mark.parametrize("name", ["x" * 600, "layers." + "1" * 5000])
def test_absurdly_long_names_are_refused(name, tmp_path):
    keys = (f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight")
    folder = write_folder(tmp_path, weights=dict(zip(keys, tensors().values(), strict=False)))
    with pytest.raises(AdapterError, match="characters, at most 512"):
        load_adapter(folder)


GUIDED = """
import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["jcrosslora.checkpoint", "jcrosslora.adapter"]):
    from hostile_files import READERS

from jcrosslora.errors import JCrossLoRAError

name, file, place, runs = sys.argv[1:]
folder, corpus = Path(place) / "case", Path(place) / "corpus"
folder.mkdir()
corpus.mkdir()
for seed in range(20):
    files = READERS[name].damage(Random(seed))
    (corpus / str(seed)).write_bytes(files.pop(file))
for other, content in files.items():
    (folder / other).write_bytes(content)


def case(data):
    (folder / file).write_bytes(data)
    try:
        READERS[name].read(folder)
    except JCrossLoRAError:
        pass


limits = ["-rss_limit_mb=2048", "-malloc_limit_mb=1024", "-timeout=5"]
atheris.Setup([sys.argv[0], f"-runs={runs}", *limits, str(corpus)], case)
atheris.Fuzz()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("safetensors", "model.safetensors"),
        ("GGUF", "x.gguf"),
        ("config.json", "config.json"),
        ("adapter config", "adapter_config.json"),
    ],
)
def test_fuzzing_that_is_guided_by_coverage(name, file, tmp_path):
    pytest.importorskip("atheris")
    arguments = [sys.executable, "-c", GUIDED, name, file, str(tmp_path), "20000"]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    ended = subprocess.run(
        arguments, env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Done 20000 runs" in ended.stderr
