"""The completions of a fit, beside the adapter that was moved."""

import dataclasses
import json

import pytest
from tiny_bases import random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora.evaluate.examples import read_prompts
from jcrosslora.methods import Moved, PadTruncate
from jcrosslora.text import Completion, Message


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    source, target = (jcl.open_base(write_llama(folder / name, seed=seed)) for seed, name in enumerate(("one", "two")))
    return jcl.transfer(random_adapter(source, roles={"q_proj"}), source, target, "pad-truncate", cache=False)


def test_completions_lie_beside_a_written_adapter(result, tmp_path):
    said = Completion((Message("user", "Où?"),), "{}"), Completion("Q: what?\nA:", " this", ended=False)
    kept = dataclasses.replace(result, completions=said)
    lines = (kept.save(tmp_path / "out") / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    chat = [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "{}"}]
    assert list(map(json.loads, lines)) == [
        {"messages": chat},
        {"prompt": "Q: what?\nA:", "completion": " this", "ended": False},
    ]
    assert read_prompts(tmp_path / "out" / "completions.jsonl") == [one.prompt for one in said]


@dataclasses.dataclass(frozen=True)
class Fitted(PadTruncate):
    """A method that claims to be fitted to one completion."""

    own: bool = True

    def move(self, plan):
        return Moved(plan.mapped.adapter, completions=(Completion("Q: what?"),), wrote_prompts=self.own)


@pytest.mark.parametrize("own", [True, False])
def test_the_completions_of_a_fit_are_kept_unless_the_user_gave_the_prompts(result, own):
    source, target = result.report.source.ref, result.report.target.ref
    adapter = random_adapter(jcl.open_base(source), roles={"q_proj"})
    moved = jcl.transfer(adapter, source, target, Fitted(own=own), cache=False)
    assert moved.texts == ("Q: what?",)
    assert [one.prompt for one in moved.completions] == (["Q: what?"] if own else [])
