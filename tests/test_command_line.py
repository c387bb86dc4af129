"""The command line itself: dispatch, help, completion, JSON, exit codes; the commands' work is tested elsewhere."""

import contextlib
import json
import subprocess
import sys

import jax
import pytest
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora.cli import cache, shelf
from jcrosslora.cli.main import COMMANDS, main

ACTIONS = {"shelf": shelf.ACTIONS, "cache": cache.ACTIONS}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_llama(folder / "source", seed=0, layers=1)
    write_llama(folder / "target", seed=1, layers=1, hidden=56, head_dim=14)
    jcl.save_adapter(random_adapter(jcl.open_base(folder / "source")), folder / "adapter", base_name="org/src")
    return folder


def transfer(files, out, *flags):
    given = [files / "adapter", "--source", files / "source", "--target", files / "target", "--out", out]
    return ["transfer", *map(str, given), *flags]


def stopped(arguments) -> int:
    """Run a command that has to exit, and give its code."""
    with pytest.raises(SystemExit) as found:
        main(arguments)
    assert isinstance(found.value.code, int)
    return found.value.code


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_help_lists_every_command_in_80_columns(arguments, capsys):
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.summary.split()] for line in lines)


def test_the_help_and_the_version_import_no_large_library():
    code = "import sys; from jcrosslora.cli.main import main; main(sys.argv[1:])\n"
    code += "print({'jax', 'tyro', 'rich', 'numpy', 'transformers'} & set(sys.modules))"
    for argument in ("--help", "--version"):
        assert python(code, argument).stdout.splitlines()[-1] == "set()"


def test_the_package_can_be_run_as_a_module():
    found = subprocess.run(
        [sys.executable, "-m", "jcrosslora", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"jcrosslora {jcl.__version__}\n"


def test_a_misspelt_command_is_one_line_with_a_suggestion(capsys):
    assert stopped(["tranfer", "x"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("jcrosslora: command 'tranfer' is unknown (did you mean 'transfer'?); use one of demo,")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("flag", [["--adapter", "x"], ["--adapter=x"]])
def test_a_flag_for_what_has_none_is_one_line_that_says_how_to_give_it(flag, capsys):
    assert stopped(["transfer", *flag, "--source", "a", "--target", "b", "--out", "c"]) == 2
    printed = capsys.readouterr().err
    assert printed == (
        "jcrosslora: --adapter is not an option: give its value alone, as in 'jcrosslora transfer ADAPTER'\n"
    )


def help_of(name, capsys, flag="--help"):
    """Return the help of a command or an action."""
    with contextlib.suppress(SystemExit):
        main([*name.split(), flag])
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize("name", [*COMMANDS, *(f"{name} {one}" for name, found in ACTIONS.items() for one in found)])
def test_every_command_has_a_help_without_riddles(name, flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = help_of(name, capsys, flag)
    assert f"usage: jcrosslora {name}" in printed
    assert max(len(line) for line in printed.splitlines() if line.startswith((" ", "│"))) <= 80
    for riddle in ("None", "STR", "PATH|", "[[STR", "{auto}", "(default: )"):
        assert riddle not in printed


def test_actions_are_listed_and_a_misspelt_one_gets_a_suggestion(capsys):
    for name, actions in ACTIONS.items():
        lines = [line.split() for line in help_of(name, capsys).splitlines()]
        assert actions.keys() <= {line[0] for line in lines if line}
    assert stopped(["shelf", "serch", "x"]) == 2
    assert capsys.readouterr().err.startswith("jcrosslora: shelf 'serch' is unknown (did you mean 'search'?); use one")
    assert stopped(["cache"]) == 2
    assert capsys.readouterr().err == "jcrosslora: cache needs an action; use one of list, verify, clear\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("transfer a --methd x", "--methd is unknown (did you mean --method?); jcrosslora transfer --help"),
        ("transfer a --probe-text=x", "--probe-text is unknown (did you mean --prompts?); jcrosslora transfer --help"),
        ("transfer a --cache", "--cache is unknown (did you mean --no-cache?); jcrosslora transfer --help"),
        ("shelf add x y --bse b", "--bse is unknown (did you mean --base?); jcrosslora shelf add --help"),
        ("cache clear --knd texts", "--knd is unknown (did you mean --kind?); jcrosslora cache clear --help"),
        ("generate -m x", "-m is unknown; jcrosslora generate --help"),
        ("transfer --source a --out c", "ADAPTER, --target are missing; jcrosslora transfer --help"),
        ("merge base adapter", "--out is missing; jcrosslora merge --help"),
        ("shelf show", "FOLDER, NAME are missing; jcrosslora shelf show --help"),
        ("inspect a b", "Unrecognized options: b; jcrosslora inspect --help"),
        ("generate --seed q", "Error parsing --seed: invalid literal for int() with base 10: 'q'; jcrosslora generate"),
        ("cache clear --kind x", "invalid choice 'x' for argument '--kind'. Expected one of ('all', 'factors', "),
    ],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_wrong_arguments_are_one_line(line, said, terminal, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert stopped(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"jcrosslora: {said}")
    assert printed.err.endswith(" lists the options\n")
    assert printed.err.count("\n") == 1


def test_what_stands_behind_two_dashes_is_no_flag(tmp_path, capsys):
    assert stopped(["inspect", "--", "--methd"]) == 2
    assert "unknown" not in capsys.readouterr().err


def test_the_help_of_a_transfer_fits_a_page_and_names_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = help_of("transfer", capsys)
    lines = printed.splitlines()
    assert len(lines) <= 60
    assert lines[-1].startswith("jcrosslora transfer --help-all lists all ")
    first, rest = printed.split(" method options ")
    assert all(f"--{flag} " in first for flag in ("source", "target", "out", "prompts", "method", "recipe"))
    assert all(f"--{flag} " in rest for flag in ("completions", "budget", "roles", "out-rank", "seed", "dry-run"))
    assert "--whitening" not in printed
    assert "--whitening" in help_of("transfer", capsys, "--help-all")


def test_quiet_prints_the_path_alone(files, tmp_path, capsys):
    main(transfer(files, tmp_path / "out", "--method", "cross-lora", "--quiet"))
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (f"{tmp_path / 'out'}\n", "")
    main(transfer(files, tmp_path / "other", "--method", "cross-lora", "--quiet", "--dry-run"))
    assert "time" in capsys.readouterr().out  # what it was asked for
    assert stopped(transfer(files, tmp_path / "out", "--method", "cross-lora", "--quiet")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("jcrosslora: ")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the devices asked for have to be missing")
@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_a_device_that_is_not_there_is_refused_before_any_work(files, tmp_path, capsys, device):
    assert stopped(transfer(files, tmp_path / "out", "--device", device)) == 2
    assert capsys.readouterr().err.startswith(f"jcrosslora: --device {device}: JAX finds only cpu: ")
    assert not (tmp_path / "out").exists()


def test_a_platform_of_the_environment_that_is_not_there_is_one_line(files, tmp_path):
    code = "import os; os.environ['JAX_PLATFORMS'] = 'tpu'\n"
    code += "import sys; from jcrosslora.cli.main import main; main(sys.argv[1:])"
    found = python(code, *transfer(files, tmp_path / "out", "--method", "cross-lora"))
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert found.stderr.startswith("jcrosslora: JAX_PLATFORMS=tpu: JAX finds no such device")


def test_methods_name_the_default_and_when_to_use_each(capsys):
    main(["methods"])
    printed = capsys.readouterr().out
    assert "auto (default)" in printed
    ours = [kind for kind in jcl.methods.METHODS.values() if kind.__module__.startswith("jcrosslora.")]
    assert len(ours) > 10
    assert all(kind.when and kind.when in printed for kind in ours)


def test_the_flags_of_a_transfer_stand_in_groups_and_the_methods_are_listed(capsys):
    assert stopped(["transfer", "--help-all"]) == 0
    printed = capsys.readouterr().out
    first, expert = printed.split(" expert options ")
    for group in ("method", "output"):
        assert f" {group} options " in first
    for group in ("hub", "source"):
        assert f" {group} options " in expert
    assert "--scale" not in first
    assert "--scale" in expert
    assert all(name in " ".join(first.split()) for name in jcl.methods.METHODS)
    assert "--no-cache" in expert
    assert "--cache," not in printed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_flags_and_methods(shell, tmp_path):
    with pytest.raises(SystemExit) as found:
        main(["--tyro-write-completion", shell, str(tmp_path / "script")])
    assert not found.value.code
    script = (tmp_path / "script").read_text()
    for text in ("transfer", "prompts", "cross-lora", "no-effect", "verify"):
        assert text in script


def test_completion_for_another_shell_is_refused_in_one_line(capsys):
    assert stopped(["--tyro-write-completion", "tcsh", "x"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err


INTERRUPTED_IMPORT = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from jcrosslora.cli.main import main
main()
"""


def test_ctrl_c_while_libraries_are_imported_leaves_no_traceback(files, tmp_path):
    found = python(INTERRUPTED_IMPORT, *transfer(files, tmp_path / "out"))
    assert found.returncode == 130
    assert found.stderr == "jcrosslora: interrupted; nothing was written\n"


def test_a_reader_that_stops_early_leaves_no_traceback():
    command = f"set -o pipefail; {sys.executable} -m jcrosslora transfer --help | true"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(
    ("method", "code"),
    [("cross-lora", 3), ("random", 0)],  # unrelated bases: no effect; a control is to have none
)
def test_a_verdict_of_no_effect_can_be_an_exit_code_of_its_own(files, tmp_path, capsys, method, code):
    given = transfer(files, tmp_path / "out", "--method", method, "--json", "--fail-on", "no-effect")
    found = stopped(given) if code else main(given)
    assert (found or 0) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("verdict: ")
    report = json.loads(printed.out)
    assert report["verdict"]["level"] == ("chance" if code else "control")
    assert report["out"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_batch_reports_as_json_and_fails_on_no_effect(files, tmp_path, capsys):
    plan = f"""
out = "{tmp_path / "out"}"
[bases]
small = "{files / "source"}"
wide = "{files / "target"}"
[adapters]
small = ["{files / "adapter"}"]
[[moves]]
from = "small"
to = "wide"
methods = ["cross-lora"]
"""
    (tmp_path / "plan.toml").write_text(plan)
    given = ["batch", str(tmp_path / "plan.toml"), "--json"]
    for fail_on, code in (("never", 0), ("no-effect", 3)):  # the second run keeps the job of the first
        flags = [*given, "--fail-on", fail_on]
        assert ((stopped(flags) if code else main(flags)) or 0) == code
        assert json.loads(capsys.readouterr().out)["done" if code == 0 else "kept"] == 1


def test_commands_that_report_do_so_as_json(files, tmp_path, capsys):
    def printed(*arguments):
        main([*map(str, arguments), "--json"])
        return json.loads(capsys.readouterr().out)

    adapter = printed("inspect", files / "adapter")
    assert (adapter["type"], adapter["base"], len(adapter["modules"])) == ("adapter", "org/src", 7)
    base = printed("inspect", files / "source")
    assert (base["type"], base["family"], base["dimensions"]["layers"]) == ("base", "llama", 1)
    assert {one["engine"] for one in printed("check", files / "adapter")} >= {"PEFT", "vLLM"}
    assert [one["name"] for one in printed("methods")] == list(jcl.methods.METHODS)
    assert printed("cache", "list").keys() == {"folder", "limit", "entries"}


def test_the_usual_table_fits_80_columns(files, tmp_path, capsys):
    main(transfer(files, tmp_path / "one", "--method", "cross-lora"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃"))]
    assert lines
    assert max(map(len, lines)) <= 80
    assert "gap" not in lines[0]
    main(transfer(files, tmp_path / "two", "--method", "cross-lora", "--table", "full"))
    assert "gap src/tgt" in capsys.readouterr().out


def test_a_default_of_zero_is_shown_and_one_that_is_off_is_not(capsys):
    assert stopped(["transfer", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "(default: 0)" in printed
    assert "False" not in printed
