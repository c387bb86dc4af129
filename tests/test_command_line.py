"""The command line itself: dispatch, help, completion, JSON, exit codes; the commands' work is tested elsewhere."""

import json
import subprocess
import sys

import pytest
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora.cli.main import COMMANDS, main


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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_without_riddles(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert stopped([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: jcrosslora {name}" in printed
    assert "None}" not in printed
    assert "(default: None)" not in printed
    assert "STR" not in printed.splitlines()[0]


def test_the_flags_of_a_transfer_stand_in_groups_and_the_methods_are_listed(capsys):
    assert stopped(["transfer", "--help"]) == 0
    printed = capsys.readouterr().out
    first, expert = printed.split(" expert options ")
    for group in ("method", "output"):
        assert f" {group} options " in first
    for group in ("hub", "cluster"):
        assert f" {group} options " in expert
    assert "--seed" not in first
    assert "--seed" in expert
    assert all(name in " ".join(first.split()) for name in jcl.methods.METHODS)
    assert "--no-cache" in expert
    assert "--cache," not in printed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_flags_and_methods(shell, tmp_path):
    with pytest.raises(SystemExit) as found:
        main(["--tyro-write-completion", shell, str(tmp_path / "script")])
    assert not found.value.code
    script = (tmp_path / "script").read_text()
    for text in ("transfer", "prompts", "scaled-procrustes", "no-effect", "verify"):
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
    assert printed.err == ""
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
