"""Further prompts like given ones: what given prompts have in common, and what is written anew."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
from probe_bases import write_base

from jcrosslora.checkpoint import load_tokenizer, open_base
from jcrosslora.decoder import StackedAdapter, Written
from jcrosslora.distill.completions import answer_given
from jcrosslora.distill.settings import ROUND
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.task_search import SIMILAR, find_form
from jcrosslora.distill.templates import Sampler
from jcrosslora.text import Message, prompt_text

LINES = [f"{verb} the {noun} now" for verb in ("play", "stop", "find") for noun in ("song", "film", "book", "game")]
CHATS = [(Message("system", "Be brief."), Message("user", f"As JSON.\nCommand: {line}")) for line in LINES]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_base(write_base(tmp_path_factory.mktemp("similar") / "base", 30))


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def test_what_prompts_have_in_common_is_found(tokenizer):
    form = find_form(CHATS, tokenizer)
    assert (form.before, form.after) == ("As JSON.\nCommand: ", " now")
    assert form.differing[:2] == ("play the song", "play the film")
    assert len(tokenizer.encode("play the song", special=False).ids) < form.tokens < 40
    texts = [f"Question: {line}?\nAnswer:" for line in LINES]
    form = find_form([*texts, *texts], tokenizer)
    assert (form.before, form.after, form.differing) == ("Question: ", " now?\nAnswer:", form.differing)
    assert form.prompts == tuple(texts)


def test_words_are_not_cut(tokenizer):
    form = find_form([f"Say {number}0 or {number}1 times" for number in range(110, 120)], tokenizer)
    assert (form.before, form.after) == ("Say ", " times")


@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param(CHATS[:7], id="too few"),
        pytest.param(CHATS[:4] * 5, id="the same ones again"),
        pytest.param([f"{line}\nand {line}" for line in LINES], id="more than a line"),
        pytest.param([f"{line} {' '.join(LINES)} {line}" for line in LINES], id="too long"),
        pytest.param([(message, Message("user", "Go on.")) for message, _ in CHATS], id="nothing differs"),
    ],
)
def test_prompts_without_a_form_are_none(tokenizer, prompts):
    assert find_form(prompts, tokenizer) is None


class Actor(DecoderSource):
    """The base writes lines, and the adapter answers."""

    asked: ClassVar[list[str]] = []

    def write(self, prompts, *_, bar=None, **__):
        found = []
        for place in range(len(prompts)):
            letters = np.random.default_rng(len(self.asked) + place).choice([*"abcdefghijklmnop"], (4, 6))
            line = " ".join("".join(word) for word in letters)
            found.append(Written("yes" if self.model.adapter is not None else f" {line}\n", 2, True))
        self.asked.extend(map(prompt_text, prompts))
        return found


def adapted(actor, name):
    return dataclasses.replace(actor, model=actor.model.with_adapter(StackedAdapter({})), adapter_name=name)


def test_where_more_answers_are_wanted_other_prompts_are_written(base):
    source = adapted(Actor.of(base), "the adapter")
    found = answer_given(source, source.alone(), CHATS, Sampler(40))
    assert [item.prompt for item in found.items[: len(CHATS)]] == CHATS
    own = [item for item in found.items if item.origin == SIMILAR]
    assert len(own) == 40 - len(CHATS) == len({item.prompt for item in own})
    for item in own:
        system, user = item.prompt
        assert system == CHATS[0][0]
        assert user.content.startswith("As JSON.\nCommand: ")
        assert user.content.endswith(" now")
    assert (found.facts.answered, found.facts.written, found.facts.answers) == (len(CHATS), len(own), 40)
    shown = next(text for text in source.asked if text.startswith("Request: "))
    assert shown.count("Request:") == 9
    later = found.more(3, {CHATS[0]}, source)
    assert sum(item.origin == SIMILAR for item in later) == ROUND // 2
    assert CHATS[0] not in {item.prompt for item in later}
    held_out = next(item.prompt for item in later if item.origin == SIMILAR)
    assert held_out not in {item.prompt for item in found.more(3, {held_out}, source)}


def test_prompts_that_were_not_answered_come_first_in_further_rounds(base):
    source = adapted(Actor.of(base), "the adapter")
    chats = [(Message("user", f"As JSON.\nCommand: number {number} now"),) for number in range(16 + ROUND + 10)]
    found = answer_given(source, source.alone(), chats, Sampler(16))
    assert [item.prompt for item in found.items] == chats[:16]
    first, second, third = ([item.prompt for item in found.more(number, (), source)] for number in (1, 2, 3))
    assert first == chats[16 : 16 + ROUND]
    assert second[:10] == chats[16 + ROUND :]
    # Then half of them are given ones again, half are written.
    assert sum(prompt in chats for prompt in second[10:]) == (ROUND - 10) // 2
    assert sum(prompt in chats for prompt in third) == ROUND // 2


def test_other_prompts_are_written_once_for_all_adapters(base):
    def requests():
        return sum(text.startswith("Request: ") for text in Actor.asked)

    shared, before = {}, requests()
    one, other = (adapted(Actor.of(base), name) for name in "ab")
    first = answer_given(one, one.alone(), CHATS, Sampler(40), shared=shared)
    written = requests() - before
    assert written == 40 - len(CHATS)
    again = answer_given(other, other.alone(), CHATS, Sampler(40), shared=shared)
    assert requests() - before == written
    assert [item.prompt for item in again.items] == [item.prompt for item in first.items]
    answer_given(other, other.alone(), CHATS, Sampler(40, seed=1), shared=shared)
    assert requests() - before == 2 * written


def test_without_a_form_given_prompts_are_answered_again(base):
    source = adapted(Actor.of(base), "the adapter")
    found = answer_given(source, source.alone(), CHATS[:4], Sampler(20))
    assert [item.prompt for item in found.items] == CHATS[:4] * 5
    assert (found.facts.answered, found.facts.written, found.facts.answers) == (4, 0, 20)
