"""The documentation: every public name is described, every link leads somewhere, the README stays short."""

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from probe_bases import CORPUS, write_move
from tiny_bases import delta, write_llama
from user_methods import methods_of_the_page

import jcrosslora as jcl
from jcrosslora.architectures import FAMILIES

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "python-api.md").read_text()
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("[!.]*/README.md")})
PUBLIC = sorted(jcl.__all__)

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name: str):
    value = getattr(jcl, name)
    if inspect.ismodule(value) or inspect.isroutine(value) or inspect.isclass(value):
        # Not inherited, and not the signature that a dataclass without a docstring gets.
        text = value.__doc__ or ""
        assert text.strip()
        assert not text.startswith(f"{name}(")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_on_the_api_page(name: str):
    assert f"`{name}`" in API


def test_the_api_page_lists_no_name_that_is_not_public():
    listed = {name for group in re.findall(r"members: \[(.*)\]", API) for name in group.split(", ")}
    assert listed <= set(PUBLIC)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path):
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            assert anchor in _anchors(target), f"{page.name} links to {link}, but {target.name} has no such heading"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}


def test_the_python_of_the_pages_is_python():
    for page in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            ast.parse(code)


def test_the_example_of_a_full_fine_tune_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "finetune", "target")):
        write_llama(tmp_path / name, seed=seed)
    text = (ROOT / "docs" / "formats-and-kinds.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {"jcl": jcl}
    exec(code, names)
    ranks = {factors.rank for factors in names["adapter"].modules.values()}
    assert len(ranks) > 2  # each module has the rank that holds the energy


def test_the_family_of_the_page_on_families_gives_the_logits_of_transformers():
    pytest.importorskip("torch")
    text = (ROOT / "docs" / "adding-a-family.md").read_text()
    family, oracle, excerpt = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert excerpt in (ROOT / "jcrosslora" / "architectures" / "families" / "mamba2.py").read_text()
    try:
        names: dict = {}
        exec(family, names)
        exec(oracle, names)
        assert names["base"].family.name == "helium"
    finally:
        FAMILIES.pop("helium", None)


@pytest.mark.full
def test_the_methods_of_the_page_on_methods_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter, source, target = write_move(tmp_path)
    Path("prompts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in CORPUS[3:]))
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    *_, calls = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    with methods_of_the_page(tmp_path) as names:
        names |= {"jcl": jcl, "adapter": adapter, "source": source, "target": target}
        plain, best, started = (eval(call, names) for call in calls.splitlines())
    assert plain.report.recipe.method == "my_maps:PlainPairs"
    assert best.report.recipe.method == "my_fit:BestOfTwo"
    assert best.report.fit.steps > 0
    # What was fitted on top of the mapped update has the rank of the fit, which the difference to any other has not.
    mapped = jcl.transfer(adapter, source, target, "pad-truncate").adapter.modules
    ranks = {
        name: np.linalg.matrix_rank(delta(started.adapter.modules[name]) - delta(mapped[name]), tol=1e-4)
        for name in mapped
    }
    assert set(ranks.values()) == {2}
    assert all(np.linalg.matrix_rank(delta(factors), tol=1e-4) > 2 for factors in mapped.values())


def test_the_readme_has_at_most_10_kb():
    assert len((ROOT / "README.md").read_bytes()) <= 8_000


def _anchors(page: Path) -> set[str]:
    """The ids that GitHub and mkdocs give to headings: lower case, spaces to hyphens, punctuation dropped."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
