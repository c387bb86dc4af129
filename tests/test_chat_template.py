"""Chat templates, against `apply_chat_template` of transformers; and where the tokens of a conversation end."""

import dataclasses
import json

import numpy as np
import pytest
from probe_bases import write_base
from tiny_bases import write_llama
from tiny_tokenizers import KINDS, write_tokenizer

from jcrosslora.checkpoint import open_base
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.errors import UsageError
from jcrosslora.text import Completion, Message, read
from jcrosslora.text.reading import PLAIN_TEMPLATE, prompt_ids, render

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Gemma's: no system role, contents stripped, the assistant called model.
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# As Mistral's: no newline around contents.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "turns": TURNS, "inst": INST, "plain": PLAIN_TEMPLATE}
USER, ANSWER, AGAIN = (
    Message("user", "which star is it?"),
    Message("assistant", "the sun é"),
    Message("user", "a river"),
)
TALKS = {"one": (USER,), "several": (USER, ANSWER, AGAIN), "answered": (USER, ANSWER)}


def tokenizer_of(folder, kind, template):
    """A tokenizer with special tokens for the turns, in a folder with a template."""
    made = KINDS[kind]()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"])
    write_llama(folder, tokenizer=False, vocab=made.get_vocab_size())
    write_tokenizer(folder, made)
    if template is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return load_tokenizer(open_base(folder)), folder


def their_text(folder, messages, ask, template):
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast.from_pretrained(str(folder))
    conversation = [{"role": one.role, "content": one.content} for one in messages]
    return own.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask, chat_template=template), own


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "sentencepiece-prefix"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
def test_text_and_tokens_are_those_of_transformers(tmp_path, kind, template, talk):
    tokenizer, folder = tokenizer_of(tmp_path, kind, TEMPLATES[template])
    for ask in (False, True):
        text, own = their_text(folder, TALKS[talk], ask, TEMPLATES[template])
        found = render(tokenizer, TALKS[talk], ask=ask)
        assert found.text == text
        assert [text[first:last] for first, last in found.spans] == [one.content for one in TALKS[talk]]
    np.testing.assert_array_equal(prompt_ids(tokenizer, TALKS[talk]), own(text, add_special_tokens=False)["input_ids"])


# What templates of published models use beside loops and conditions.
LANGUAGE = (
    "{%- macro turn(role) -%}\n<|{{ role }}|>{{ caller() }}\n{%- endmacro -%}\n"
    "{% set ns = namespace(n=0, last='') %}\n"
    "  {% for m in messages if m.role != 'system' %}\n"
    "    {% if loop.index0 > 4 %}{% break %}{% endif %}\n"
    "    {% set ns.n = ns.n * 2 + 1 %}{% set ns.last = ns.last + '=' * 2 ~ ns.n %}\n"
    "    {% call turn(m['role']) %}{% generation %}{{ m.content }}{% endgeneration %}{% endcall %}\n"
    "  {% endfor %}\n"
    "{% filter upper %}{{ messages[0].role[1:] }}{% endfilter %}{% set x | replace('a', 'b') %}ab{% endset %}{{ x }}"
    "{{ messages | length }}{{ messages | map(attribute='role') | join(', ') }}{{ ns.last }}{{ tools is none }}\n"
    "{{ {'é<': [1, none]} | tojson }}{{ dict(a=2 ** 3).items() | list }}{{ absent }}{{ strftime_now('%Y') }}"
    "{{ 'yes' if add_generation_prompt and 'user' in messages[-1].role else 'no' }}"
)


def test_the_language_of_templates_is_that_of_transformers(tmp_path):
    tokenizer, folder = tokenizer_of(tmp_path, "byte-level", LANGUAGE)
    for ask in (False, True):
        assert (
            render(tokenizer, TALKS["answered"], ask=ask).text
            == their_text(folder, TALKS["answered"], ask, LANGUAGE)[0]
        )


DOUBLED = "{% set ns = namespace(s='xx') %}{% for _ in range(99) %}{% set ns.s = "
ENDLESS = {
    "nested loops": "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}",
    "loops that run for nothing": "{% for _ in range(99999) %}{% for _ in range(99999) if 0 %}{% endfor %}{% endfor %}",
    "loops over a text": "{% set x = 'x' * 99999 %}{% for _ in x %}{% for _ in x %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(60) }}",
    "a large power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a product": "{{ 'x' * 9999999999 }}",
    "a wide field": "{{ 'x' | center(9999999999) }}",
    "a text that doubles": DOUBLED + "ns.s ~ ns.s %}{% endfor %}",
    "a list that doubles": DOUBLED.replace("'xx'", "[1]") + "ns.s + ns.s %}{% endfor %}",
    "much text": "{% for _ in range(9999) %}" + "x" * 9999 + "{% endfor %}",
    "a map of ranges": "{{ ([range(99999)] * 99999) | map('list') | list }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_too_much_is_refused(tmp_path, name):
    tokenizer, _ = tokenizer_of(tmp_path, "byte-level", ENDLESS[name] + CHATML)
    with pytest.raises(UsageError, match=r"its chat template refuses .*(more work than|wanted at most).*--template"):
        render(tokenizer, (USER,))
    # The next one begins anew.
    assert "star" in render(dataclasses.replace(tokenizer, chat_template=CHATML), (USER,)).text


@pytest.mark.parametrize("attribute", ["namespace(__class__=1)", "''.__class__", "[].append(1)"])
def test_a_template_reaches_nothing_outside(tmp_path, attribute):
    tokenizer, _ = tokenizer_of(tmp_path, "byte-level", f"{{% set x = {attribute} %}}{{{{ x + 1 }}}}{CHATML}")
    with pytest.raises(UsageError, match="refuses"):
        render(tokenizer, (USER,))


def test_a_template_in_a_file_of_its_own_is_found(tmp_path):
    write_base(tmp_path, 60)
    assert load_tokenizer(open_base(tmp_path)).chat_template is None
    (tmp_path / "chat_template.jinja").write_text(INST)
    assert load_tokenizer(open_base(tmp_path)).chat_template == INST


def test_a_given_template_is_used_in_place_of_the_bases_own(tmp_path):
    write_base(tmp_path / "base", 60)
    (tmp_path / "base" / "chat_template.jinja").write_text(INST)
    (tmp_path / "other.jinja").write_text(CHATML)
    base = open_base(tmp_path / "base", chat_template=tmp_path / "other.jinja")
    assert load_tokenizer(base).chat_template == CHATML
    assert open_base(base).chat_template == CHATML
    (tmp_path / "empty.jinja").write_text("\n")
    for name, reason in (
        ("none.jinja", "no chat template that can be read"),
        ("empty.jinja", "holds no chat template"),
    ):
        with pytest.raises(UsageError, match=reason):
            open_base(tmp_path / "base", chat_template=tmp_path / name)


def test_contents_are_found_where_the_template_says_the_same_words(tmp_path):
    tokenizer, _ = tokenizer_of(tmp_path, "byte-level", CHATML)
    found = render(tokenizer, (Message("user", "user"), Message("assistant", "assistant")), ask=True)
    assert found.spans == ((17, 21), (54, 63))


def test_space_that_a_template_strips_does_not_shift_the_characters(tmp_path):
    one, other = (tokenizer_of(tmp_path / name, "byte-level", TEMPLATES[name])[0] for name in ("chatml", "turns"))
    talk = Completion((Message("user", "\n the river "),), "the sun")
    readings = [read(tokenizer, talk) for tokenizer in (one, other)]
    places = [set(zip(found.content.tolist(), found.end.tolist(), strict=True)) for found in readings]
    assert {(0, 5), (1, 0), (1, 7)} <= places[0] & places[1]


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), ("turns", "<end_of_turn>"), ("inst", "</s>")])
def test_an_answer_ends_with_what_the_template_puts_behind_it(tmp_path, template, end):
    tokenizer, _ = tokenizer_of(tmp_path, "byte-level", TEMPLATES[template])
    whole, cut = (read(tokenizer, Completion((USER,), "the sun", ended)) for ended in (True, False))
    assert whole.stop
    assert not cut.stop
    assert tokenizer.backend.id_to_token(int(whole.ids[-1])) == end
    assert whole.ids[:-1].tolist() == cut.ids.tolist()
    assert tokenizer.decode(cut.ids[cut.answer :]) == "the sun"
    assert cut.ids[: cut.answer].tolist() == prompt_ids(tokenizer, (USER,)).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["the sun", "日本", "é"])
def test_plain_answers_begin_behind_the_prompt(tmp_path, kind, answer):
    tokenizer, _ = tokenizer_of(tmp_path, kind, None)
    prompt = "Question: which?\nAnswer:"
    found = read(tokenizer, Completion(prompt, " " + answer))
    assert tokenizer.decode(found.ids[found.answer :]).strip() == answer
    assert found.ids[-1] == tokenizer.eos
    assert (found.content[:-1].max(), found.end.max()) == (0, len(prompt) + 1 + len(answer))


def test_matched_places_of_two_templates_have_the_same_text_behind_them(tmp_path):
    one = tokenizer_of(tmp_path / "one", "byte-level", CHATML)[0]
    other = tokenizer_of(tmp_path / "other", "sentencepiece", TURNS)[0]
    talk = Completion((USER, ANSWER, AGAIN), "the moon")
    contents = [*(message.content for message in talk.prompt), talk.answer]

    def rest(tokenizer: Tokenizer, found, place):
        text = tokenizer.backend.decode(found.ids[place + 1 :].tolist(), skip_special_tokens=False)
        return text.startswith(contents[found.content[place]][found.end[place] :])

    readings = [(tokenizer, read(tokenizer, talk)) for tokenizer in (one, other)]
    for tokenizer, found in readings:
        assert all(rest(tokenizer, found, place) for place in np.flatnonzero(found.content >= 0))
    keys = [set(zip(found.content.tolist(), found.end.tolist(), strict=True)) - {(-1, 0)} for _, found in readings]
    assert {content for content, _ in keys[0] & keys[1]} == {0, 1, 2, 3}


def test_a_template_that_refuses_the_messages_is_one_clear_error(tmp_path):
    tokenizer, _ = tokenizer_of(tmp_path, "byte-level", TURNS)
    with pytest.raises(UsageError, match=r"refuses messages of system, user \(TemplateError: no system role\)"):
        render(tokenizer, (Message("system", "s"), USER))


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] | upper }}", "{{ 'nothing' }}", "{% if %}"])
def test_a_template_that_loses_the_messages_is_refused(tmp_path, template):
    tokenizer, _ = tokenizer_of(tmp_path, "byte-level", template)
    with pytest.raises(UsageError, match="--template"):
        render(tokenizer, (USER,))


def test_an_answer_without_a_token_is_refused(tmp_path):
    tokenizer, _ = tokenizer_of(tmp_path, "byte-level", CHATML)
    with pytest.raises(UsageError, match="no separate token"):
        read(tokenizer, Completion((USER,), ""))
