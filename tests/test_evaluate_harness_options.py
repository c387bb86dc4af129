"""What tasks of lm-evaluation-harness may ask of written text, and what happens where the harness is missing."""

import importlib
import subprocess
import sys

import pytest
from command_line import main
from probe_bases import write_base

from jcrosslora.errors import UsageError
from jcrosslora.evaluate.harness_requests import Options, read_options

MODEL = "jcrosslora.evaluate.harness_model"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Options((), 256, 0.0)),
        ({"until": "\n", "max_gen_toks": 5}, Options(("\n",), 5, 0.0)),
        ({"until": ["a", "", "b"], "max_new_tokens": 7, "max_tokens": 9}, Options(("a", "b"), 7, 0.0)),
        ({"until": None, "max_gen_toks": None, "max_tokens": 9}, Options((), 9, 0.0)),
        ({"do_sample": False, "temperature": 0.7}, Options((), 256, 0.0)),
        ({"do_sample": True, "temperature": 1}, Options((), 256, 1.0)),
        ({"temperature": 0.5}, Options((), 256, 0.5)),
        ({"do_sample": False, "top_p": 0.9, "top_k": 50, "num_beams": 1}, Options()),
        ({"temperature": 0.5, "top_p": 1.0, "top_k": 0}, Options((), 256, 0.5)),
    ],
)
def test_settings_are_read_as_the_harness_reads_them(given, wanted):
    assert read_options(given) == wanted


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"until": 3}, "until is 3"),
        ({"until": ["a", None]}, "until is"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"do_sample": True}, "temperature is 0.0"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.9}, "top_p is 0.9"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 50}, "top_k is 50"),
        ({"num_beams": 4}, "num_beams is 4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2"),
    ],
)
def test_settings_that_are_not_supported_are_named(given, named):
    with pytest.raises(UsageError) as caught:
        read_options(given)
    assert str(caught.value).startswith(f"generation setting {named}")
    assert "wanted" in str(caught.value)


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, MODEL, raising=False)
    with pytest.raises(UsageError, match=r"pip install 'jcrosslora\[eval\]'"):
        importlib.import_module(MODEL)
    main = importlib.import_module("jcrosslora.evaluate.harness").main
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("jcrosslora: ")
    assert printed.count("\n") == 1


def test_the_package_does_not_import_the_harness():
    lines = "import jcrosslora.evaluate.harness, sys; print(*(n for n in ('lm_eval', 'datasets') if n in sys.modules))"
    found = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "neither --data nor --tasks was given"),
        (["--data", "a.jsonl", "--tasks", "arc_easy"], "both --data and --tasks were given"),
        (["--tasks", "arc_easy", "--show", "3"], "--show is not for --tasks"),
        (["--data", "a.jsonl", "--num-fewshot", "3"], "--num-fewshot is not for --data"),
        (["--tasks", "arc_easy", "--num-fewshot", "-1"], "num-fewshot -1 is out of range"),
        (["--tasks", "arc_easy", "--limit", "0"], "limit 0 is out of range"),
        (["--task", "arc_easy"], "--task is unknown (did you mean --data?)"),
        (["--tasks", "arc_easy"], "no base was given"),
    ],
)
def test_a_file_and_names_of_tasks_are_alternatives(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *flags])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert said in error


def test_the_command_names_the_extra_where_the_harness_is_missing(tmp_path, monkeypatch, capsys):
    write_base(tmp_path / "base", 60)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, MODEL, raising=False)
    with pytest.raises(SystemExit):
        main(["evaluate", "--base", str(tmp_path / "base"), "--tasks", "arc_easy"])
    error = capsys.readouterr().err
    assert "pip install 'jcrosslora[eval]'" in error
    assert error.count("\n") == 1
