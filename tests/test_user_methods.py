"""A method in a user's own file: registered, moved with by every way there is, and known by its file."""

import dataclasses
import json
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from command_line import main
from full_set import full_except
from safetensors.numpy import save_file
from tiny_bases import delta, llama_tensors, random_adapter, write_llama
from user_methods import HalfCopy

import jcrosslora as jcl
from jcrosslora import read_plan, run_batch
from jcrosslora.adapter import Adapter, TokenUpdate
from jcrosslora.errors import AdapterError, CheckpointError, MethodError, UsageError
from jcrosslora.methods import (
    METHODS,
    Copy,
    CrossLoRA,
    FitFacts,
    LoRAX,
    MapMethod,
    Method,
    Moved,
    PadTruncate,
    allow_module,
    find_method,
)
from jcrosslora.utils.cache import Cache

PLAN = """
out = "moved"
bases = { source = "source", target = "target" }
adapters = { source = ["adapter"] }
[[moves]]
from = "source"
to = ["target"]
methods = ["user_methods:HalfCopy", "pad-truncate"]
share = 0.25
"""
# One that decomposes, so that its transports are kept.
OWN = """
from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.methods import CrossLoRA


@dataclass(frozen=True)
class Own(CrossLoRA):
    name: ClassVar[str] = "own"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    write_llama(folder / "source", seed=0)
    write_llama(folder / "target", seed=1, hidden=64, heads=4, head_dim=16)
    jcl.save_adapter(random_adapter(jcl.open_base(folder / "source")), folder / "adapter", base_name="org/src")
    return folder


@pytest.fixture(scope="module")
def copied(folder):
    """What the whole of the update becomes."""
    return jcl.transfer(folder / "adapter", folder / "source", folder / "target", "pad-truncate").adapter.modules


def assert_share(modules, copied, share):
    assert modules.keys() == copied.keys()
    for name, factors in modules.items():
        np.testing.assert_allclose(delta(factors), share * delta(copied[name]), atol=1e-5)


@pytest.mark.parametrize(
    "method", full_except([HalfCopy(share=0.25), HalfCopy, "user_methods:HalfCopy"], ["user_methods:HalfCopy"])
)
def test_in_memory_as_an_object_a_class_or_a_name(folder, copied, method):
    moved = jcl.transfer(folder / "adapter", folder / "source", folder / "target", method)
    share = 0.25 if isinstance(method, HalfCopy) else 0.5
    assert_share(moved.adapter.modules, copied, share)
    assert (moved.report.recipe.method, moved.report.recipe.settings) == ("user_methods:HalfCopy", {"share": share})


def test_by_the_command_and_by_its_recipe(folder, copied, tmp_path, capsys):
    places = [folder / "adapter", "--source", folder / "source", "--target", folder / "target"]
    own = ["--method", "user_methods:HalfCopy", "--share", "0.25"]
    main(["transfer", *map(str, places), *own, "--out", str(tmp_path / "one")])
    assert "user_methods:HalfCopy, share 0.25" in capsys.readouterr().out
    assert_share(jcl.load_adapter(tmp_path / "one").modules, copied, 0.25)
    recipe = json.loads((tmp_path / "one" / "transfer_report.json").read_text())["recipe_toml"]
    assert tomllib.loads(recipe)["share"] == 0.25
    (tmp_path / "recipe.toml").write_text(recipe)
    assert "`--allow-module user_methods` once you" in (tmp_path / "one" / "README.md").read_text()
    assert "with --allow-module.\n" in (tmp_path / "one" / "recipe.toml").read_text()
    main(["transfer", *map(str, places), "--recipe", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "two")])
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    main(["transfer", *map(str, places), "--method", "half-copy", "--out", str(tmp_path / "three")])  # now registered
    assert_share(jcl.load_adapter(tmp_path / "three").modules, copied, 0.5)


def test_recipe_with_an_own_file_of_postponed_annotations(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = OWN.replace('"own"', '"own-postponed"') + "    strength: float = 0.5\n"
    Path("own_postponed.py").write_text(f"from __future__ import annotations\n{text}")
    for value, shown in (('"much"', "recipe.toml sets strength to 'much'; it must be float"), ("1", "no such folder")):
        Path("recipe.toml").write_text(f'method = "own_postponed:Own"\nstrength = {value}\n')
        given = ["./a", "--source", "s", "--target", "t", "--out", "o", "--recipe", "recipe.toml"]
        with pytest.raises(SystemExit):
            main(["transfer", *given, "--allow-module", "own_postponed"])
        assert shown in capsys.readouterr().err
        del METHODS["own-postponed"]


EVIL = (
    OWN.replace('"own"', '"evil"')
    + """
open("mark", "w").close()
"""
)
PLACES = ["--source", "source", "--target", "target"]
COMMANDS = {
    "a recipe": ["transfer", "adapter", *PLACES, "--out", "out", "--recipe", "recipe.toml"],
    "a recipe and another method": [
        *("transfer", "adapter", *PLACES, "--out", "out", "--recipe", "recipe.toml", "--method", "copy")
    ],
    "a recipe and another module": [
        *("transfer", "adapter", *PLACES, "--out", "out", "--recipe=recipe.toml", "--allow-module", "user_methods")
    ],
    "a plan": ["batch", "plan.toml"],
    "a plan and another module": ["batch", "plan.toml", "--allow-module", "user_methods"],
}


@pytest.fixture
def stranger(folder, tmp_path, monkeypatch):
    """The current folder: files of somebody else's, which name a module in it that leaves a mark when it is run."""
    monkeypatch.chdir(tmp_path)
    for name in ("source", "target", "adapter"):
        Path(name).symlink_to(folder / name)
    Path("evil.py").write_text(EVIL)
    Path("recipe.toml").write_text('method = "evil:Own"\nsvd_rank = 4\n')
    plan = PLAN.replace('"user_methods:HalfCopy", "pad-truncate"', '"evil:Own"')
    Path("plan.toml").write_text(plan.replace("share = 0.25", "svd_rank = 4"))
    yield Path("mark")
    METHODS.pop("evil", None)
    sys.modules.pop("evil", None)


@pytest.mark.parametrize("dry", [False, True], ids=["done", "dry-run"])
@pytest.mark.parametrize("given", COMMANDS)
def test_files_have_no_module_imported(stranger, given, dry, capsys):
    with pytest.raises(SystemExit) as end:
        main([*COMMANDS[given], *(["--dry-run"] if dry else [])])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert "method 'evil:Own' is in a module that is imported only if you name it yourself" in said
    assert "give --allow-module evil" in said
    assert len(said.splitlines()) == 1
    assert not stranger.exists()


@pytest.mark.parametrize("names", [["--allow-module", "evil"], ["--allow-module", "json", "--allow-module=evil"]])
@pytest.mark.parametrize("given", ["a recipe", "a plan"])
def test_files_may_name_methods_of_modules_that_the_user_names(stranger, given, names):
    main([*COMMANDS[given], *names])
    assert stranger.exists()
    out = Path("out" if given == "a recipe" else "moved/adapter--target--evil-Own")
    assert json.loads((out / "transfer_report.json").read_text())["recipe"]["method"] == "evil:Own"


def test_a_method_on_the_command_line_allows_its_module(stranger):
    main([*COMMANDS["a recipe"], "--method", "evil:Own"])
    assert stranger.exists()


def test_names_of_a_method_in_python_import_nothing(stranger):
    with pytest.raises(MethodError, match="or import it in Python"):
        jcl.transfer("adapter", "source", "target", method="evil:Own")
    with pytest.raises(MethodError, match=r"plan\.toml, move 1: method 'evil:Own'"):
        read_plan("plan.toml")
    assert not stranger.exists()


def test_by_a_batch_whose_other_methods_do_not_have_its_setting(folder, copied, tmp_path):
    for name in ("source", "target", "adapter"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "plan.toml").write_text(PLAN)
    own, other = run_batch(read_plan(tmp_path / "plan.toml")).outcomes.values()
    assert Path(own.out).name == "adapter--target--user_methods-HalfCopy"
    assert (own.status, other.status) == ("done", "done")
    assert_share(jcl.load_adapter(own.out).modules, copied, 0.25)
    assert_share(jcl.load_adapter(other.out).modules, copied, 1)


@pytest.mark.full
def test_what_was_kept_is_not_found_once_its_file_has_changed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a console script finds what lies there
    Path("own_method.py").write_text(OWN)
    allow_module("own_method")
    method = find_method("own_method:Own")(svd_rank=4)
    bases = jcl.open_base(folder / "source"), jcl.open_base(folder / "target")
    cache, counts = Cache(tmp_path / "cache", limit=10**9), []
    for text in (OWN, OWN, f"{OWN}# changed\n"):
        Path("own_method.py").write_text(text)
        jcl.align(*bases, method, cache=cache)
        counts.append(sum(entry.kind == "transport" for entry in cache.entries()))
    assert counts[0] == counts[1] > 0
    assert counts[2] == 2 * counts[0]


@pytest.mark.full
def test_a_batch_moves_again_what_a_changed_method_moved(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("source", "target", "adapter"):
        (tmp_path / name).symlink_to(folder / name)
    Path("own_batch_method.py").write_text(OWN.replace('"own"', '"own-batch"'))
    text = PLAN.replace('"user_methods:HalfCopy", "pad-truncate"', '"own_batch_method:Own"')
    Path("plan.toml").write_text(text.replace("share = 0.25", "svd_rank = 4"))
    allow_module("own_batch_method")
    plan = read_plan("plan.toml")
    assert run_batch(plan).count("done") == 1
    assert run_batch(plan).count("kept") == 1
    Path("own_batch_method.py").write_text(OWN.replace('"own"', '"own-batch"') + "# changed\n")
    (outcome,) = run_batch(plan).outcomes.values()
    assert (outcome.status, "exists already" in outcome.text) == ("failed", True)
    assert run_batch(plan, overwrite=True).count("done") == 1


def test_a_method_that_forgets_to_ask_for_its_evidence_is_told_which(folder):
    @dataclass(frozen=True)
    class Forgetful(LoRAX):
        name: ClassVar[str] = "forgetful"
        requires: ClassVar[frozenset[jcl.EvidenceKind]] = frozenset()

    with pytest.raises(MethodError, match=r"method forgetful reads .*add EvidenceKind\.SINGULAR_VECTORS"):
        jcl.align(folder / "source", folder / "source", Forgetful())


def test_a_setting_that_a_method_does_not_have_is_refused(folder):
    with pytest.raises(UsageError, match="method half-copy has no setting svd_rank; its settings are share"):
        jcl.TransferSettings.of(adapter="a", source="s", target="t", out="o", method=HalfCopy, svd_rank=3)
    with pytest.raises(UsageError, match="method pad-truncate has no setting share; it has no settings"):
        jcl.TransferSettings.of(adapter="a", source="s", target="t", out="o", method="pad-truncate", share=0.3)


# --- registration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken(Method):
    name: ClassVar[str] = "copy"


@dataclass(frozen=True)
class Unset(Method):
    name: ClassVar[str] = "unset"
    share: float


@dataclass
class Loose:
    name: ClassVar[str] = "loose"


class Undecorated(Method):
    name = "undecorated"


@dataclass(frozen=True)
class Nameless(Method):
    share: float = 0.5


@dataclass(frozen=True)
class Idle(Method):
    """It has maps, and no code of the package calls them."""

    name: ClassVar[str] = "idle"

    def maps(self, evidence):
        return PadTruncate().maps(evidence)


@dataclass(frozen=True)
class Mapless(MapMethod):
    name: ClassVar[str] = "mapless"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Taken, "another method is called 'copy'; choose another name"),
        (Unset, "method unset: field share has no default"),
        (Undecorated, "method undecorated: it is not a frozen dataclass"),
        (Loose, "is not a method; write a class that inherits from jcrosslora.MapMethod, with a name"),
        (Nameless, "is not a method"),
        (Idle, "does not say how it moves an update; inherit from jcrosslora.MapMethod and write `maps`"),
        (Mapless, "does not say how it moves an update"),
        (HalfCopy(), "is not a method"),
    ],
)
def test_what_cannot_be_registered(method, said):
    before = dict(jcl.methods.METHODS)
    with pytest.raises(MethodError, match=said):
        jcl.register_method(method)
    assert before == jcl.methods.METHODS


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:Own", "give --allow-module no_such_module"),
        ("user_methods:Absent", "its module has no Absent"),
        ("user_methods:HOOKS", "is not a method"),
        (":Own", "is imported only if you name it"),
        ("user_methods:", "is imported only if you name it"),
        ("half-coppy", "'half-coppy' is unknown.*did you mean .?half-copy"),
    ],
)
def test_names_that_lead_to_no_method(name, said):
    jcl.register_method(HalfCopy)
    with pytest.raises(MethodError, match=said):
        find_method(name)


@pytest.mark.parametrize("name", ["no_such_module:Own", "no_such_module", ":Own", ".own"])
def test_modules_that_cannot_be_imported(name):
    with pytest.raises(MethodError, match="cannot be imported"):
        allow_module(name)


def test_registering_the_same_class_again_changes_nothing():
    assert jcl.register_method(HalfCopy) is jcl.register_method(HalfCopy) is jcl.methods.METHODS["half-copy"]
    assert dataclasses.fields(HalfCopy)[0].default == 0.5


def test_a_method_without_a_file_as_in_a_notebook_takes_part(folder, tmp_path):
    cells = (
        "class Cell(MapMethod):\n    name = 'cell'\n    def maps(self, evidence):\n        return padded_maps(evidence)"
    )
    made = []
    for code in (cells, cells.replace("(evidence)", "(evidence=evidence)")):
        scope = {"MapMethod": jcl.MapMethod, "__name__": "a_notebook", "padded_maps": PadTruncate().maps}
        exec(code, scope)
        made.append(dataclasses.dataclass(frozen=True)(scope["Cell"]))
    first, second = made
    assert first.source_file() is None
    assert first().cache_key() != second().cache_key()  # another code
    result = jcl.transfer(folder / "adapter", folder / "source", folder / "target", first(), cache=False)
    assert result.report.recipe.method == "a_notebook:Cell"


# --- fits ------------------------------------------------------------------------------------------------------------


CONSTANT = FitFacts(note="set to a constant")


@dataclass(frozen=True)
class Constant(Method):
    """A fit that looks at nothing."""

    name: ClassVar[str] = "constant"

    def move(self, plan):
        assert plan.mapped is None
        return Moved(random_adapter(plan.target, roles=("q_proj",), rank=2), fit=CONSTANT)


def test_a_fit_reads_no_weights(folder, tmp_path):
    """Weights that are not numbers stop a map method, and are nothing to a fit."""
    tensors = {name: np.full_like(tensor, np.nan) for name, tensor in llama_tensors().items()}
    write_llama(tmp_path / "broken")
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    places = folder / "adapter", tmp_path / "broken", folder / "target"
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        jcl.transfer(*places, CrossLoRA(svd_rank=4), cache=False)
    found = jcl.transfer(*places, Constant(), cache=False)
    assert {name.rpartition(".")[2] for name in found.adapter.modules} == {"q_proj"}
    assert (found.report.fit, found.report.unmapped_sources) == (CONSTANT, ())
    assert {row.target for row in found.report.rows} == set(found.adapter.modules)


# --- all that a method returns is written ----------------------------------------------------------------------------


def token_rows(base, ids=(5, 9)):
    rows = np.random.default_rng(len(ids)).normal(size=(len(ids), base.dims.hidden)).astype(np.float32)
    return (TokenUpdate("tied", "tokens", base.dims.vocab, np.array(ids), rows=rows, share=0.1),)


@dataclass(frozen=True)
class WithRows(Method):
    """A fit of linear modules and of the rows of tokens."""

    name: ClassVar[str] = "with-rows"

    def move(self, plan):
        adapter = random_adapter(plan.target, roles=("q_proj",), rank=2)
        return Moved(dataclasses.replace(adapter, tokens=token_rows(plan.target)), fit=CONSTANT)


def test_rows_of_tokens_that_a_fit_returns_are_written(folder, tmp_path):
    target = jcl.open_base(folder / "target")
    found = jcl.transfer(folder / "adapter", folder / "source", target, WithRows(), cache=False)
    (update,) = found.adapter.tokens
    assert update.same_change(token_rows(target)[0])
    out = found.save(tmp_path / "peft", profile="peft")
    assert jcl.load_adapter(out, target).tokens[0].same_change(update)
    said = "trained tokens (trainable_token_indices), model.embed_tokens, lm_head"
    assert f"{said}: 2 rows, made by the method" in (out / "README.md").read_text()
    out = found.save(tmp_path / "portable")
    assert f"not written: {said} (10.0% of" in (out / "README.md").read_text()
    assert json.loads((out / "transfer_report.json").read_text())["tokens"] == []


@dataclass(frozen=True)
class Bare(Copy):
    """A copy that returns some of the modules, and nothing else."""

    name: ClassVar[str] = "bare"

    def move(self, plan):
        return Moved(
            Adapter(
                {name: plan.mapped.adapter.modules[name] for name in plan.mapped.adapter.modules if "q_proj" in name}
            )
        )


@pytest.mark.parametrize("calibrate", ["none", "frobenius"])
def test_what_a_method_does_not_return_is_not_written_and_named(folder, calibrate):
    source = jcl.open_base(folder / "source")
    adapter = dataclasses.replace(random_adapter(source, roles=("q_proj", "v_proj")), tokens=token_rows(source))
    options = {"cache": False, "calibrate": calibrate, "out_rank": 2}
    copied, bare = (jcl.transfer(adapter, source, source, method, **options) for method in ("copy", Bare()))
    assert (len(copied.adapter.tokens), copied.report.tokens[0].moved) == (1, 2)
    assert {name.rpartition(".")[2] for name in bare.adapter.modules} == {"q_proj"}
    assert (bare.adapter.tokens, bare.report.tokens) == ((), ())
    assert any(
        text.startswith("not moved: trained tokens") and "method bare left it out" in text
        for text in bare.report.warnings
    )
    assert all((row.norm_after == 0) == (row.role == "v_proj") for row in bare.report.rows)


def test_an_update_that_does_not_fit_the_target_is_refused(folder):
    @dataclass(frozen=True)
    class Astray(Constant):
        name: ClassVar[str] = "astray"

        def move(self, plan):
            return Moved(random_adapter(plan.pair.source), fit=FitFacts(note="to the wrong base"))

    with pytest.raises(AdapterError, match=r"moved has an update of 48 x 48 for model\.layers\.0\.self_attn\.q_proj"):
        jcl.transfer(folder / "adapter", folder / "source", folder / "target", Astray(), cache=False)


def test_a_fit_has_no_maps_to_apply(folder):
    transport = jcl.align(folder / "source", folder / "target", Constant())
    assert transport.groups == ()
    with pytest.raises(MethodError, match=r"constant has no maps to apply: use jcrosslora\.shift"):
        jcl.apply(transport, jcl.load_adapter(folder / "adapter"))
    assert jcl.shift(transport, folder / "adapter").report.fit == CONSTANT


@pytest.mark.parametrize("start", ["copy", None])
def test_a_fit_starts_from_the_maps_that_it_names(folder, start):
    @dataclass(frozen=True)
    class Started(Method):
        name: ClassVar[str] = "started"

        @property
        def map_method(self):
            return start and METHODS[start]()

        def move(self, plan):
            return Moved(plan.mapped.adapter if plan.mapped else random_adapter(plan.target, seed=9), fit=FitFacts())

    found = jcl.transfer(folder / "adapter", folder / "source", folder / "source", Started(), cache=False)
    original = jcl.load_adapter(folder / "adapter")
    same = all(
        np.array_equal(delta(factors), delta(original.modules[name])) for name, factors in found.adapter.modules.items()
    )
    assert same == (start == "copy")


def test_the_verdict_on_a_method_without_a_measure_promises_nothing(folder):
    assert HalfCopy.measure == "none"
    found = jcl.transfer(folder / "adapter", folder / "source", folder / "target", HalfCopy(), cache=False)
    assert found.verdict.level == "unknown"
    assert "measures no agreement of the two bases" in found.verdict.text
