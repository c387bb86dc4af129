"""Chat templates, against `apply_chat_template` of transformers; and where the tokens of a conversation end."""

import dataclasses
import json
import re
import resource
import time
from pathlib import Path

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
from jcrosslora.text.reading import tokenizer_of as tokenizer_for
from jcrosslora.text.sandbox import run_template

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


# What templates of tool calls use: JSON in all forms, lists that grow, answers looked up by their number, marked text.
TOOLS = (
    "{%- macro kind(value) -%}{% if value is mapping %}map{% elif value is string %}text{% elif value is boolean %}bool"
    "{% elif value is number %}number{% elif value is none %}none{% elif value is sequence %}list{% endif %}"
    "{%- endmacro -%}\n"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n{{ tool.function | tojson | safe }}\n"
    "{% for key, value in tool.function.parameters.properties | dictsort %}{{ key ~ ': ' ~ value.type | upper }}"
    "{% if value.enum is defined and 'enum' in value %} ({{ value.enum | unique | join(', ') }})"
    "{% endif %};{% endfor %}"
    "{{ tool.function.parameters.required | map('title') | list | tojson(separators=(',', ':')) }}\n{% endfor %}"
    "{% set ns = namespace(calls=[], last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content | default('', true) %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.first or messages[loop.index0 - 1].role != m.role %}[{{ m['role'] | capitalize }}]{% endif %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{% set ns.calls = ns.calls + m.tool_calls %}"
    "{% for call in m.tool_calls %}{{ '{\"name\": \"' ~ call.function.name ~ '\", ' }}"
    "{% for key, value in call.function.arguments.items() %}{{ key }}={{ kind(value) }}:"
    "{{ value if value is string else value | tojson(ensure_ascii=false) }}{{ ', ' if not loop.last }}{% endfor %}}"
    "{% endfor %}{% elif m.role == 'tool' %}{% for call in ns.calls if call.id == m.tool_call_id %}"
    "{{ ('<' | safe) + call.function.name + '>' }}{% endfor %}{{ text | indent(2, first=True) }}"
    "{% elif 0 <= loop.index0 <= ns.last %}{{ text.strip() | replace('star', 'sun') }}{% else %}{{ text }}{% endif %}"
    "{{ '\\n' * 2 }}{% endfor %}{{ ns.calls }}"
    "{{ (messages | selectattr('role', 'equalto', 'user') | list | length) % 2 }}"
    "{{ messages[::-1][0].role }}{{ (messages | map(attribute='role') | list)[-2:] }}"
    "{% if add_generation_prompt %}[Assistant]{% endif %}"
)
WEATHER = {
    "name": "weather",
    "description": 'Say <how> it "is" & é',
    "parameters": {
        "type": "object",
        "properties": {"unit": {"type": "string", "enum": ["c", "f", "c"]}, "city": {"type": "string"}},
        "required": ["city"],
    },
}
CALL = {"name": "weather", "arguments": {"city": "é\n", "days": [1, {"a": None}], "deep": {}, "n": 2.5, "now": True}}
TOOL_TALKS = {
    "called": (
        {"role": "system", "content": ' be "brief" '},
        {"role": "user", "content": "which star?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "x1", "type": "function", "function": CALL}]},
        {"role": "tool", "tool_call_id": "x1", "content": "22\n23"},
        {"role": "assistant", "content": "<think>\na star\n</think>\n\na star"},
    ),
    "asked": ({"role": "user", "content": "a star"}, {"role": "user", "content": "the star"}),
}


@pytest.mark.parametrize("talk", TOOL_TALKS)
def test_tool_calls_are_those_of_transformers(tmp_path, talk):
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_of(tmp_path, "byte-level", TOOLS)[1]))
    messages, tools = list(TOOL_TALKS[talk]), [{"type": "function", "function": WEATHER}]
    for ask in (False, True):
        theirs = own.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
        assert run_template(TOOLS, messages, tools=tools, add_generation_prompt=ask) == theirs


# As templates for images look for them in contents of any kind, and as Gemma 4's looks at other messages for each.
LOOKS = "{% for m in messages %}{% for c in m.content %}{% if c.type is defined %}x{% endif %}{% endfor %}{% endfor %}"
LOOKS += "{% for m in messages %}{% for n in messages[loop.index0:] %}{% if n.role == 'tool' %}x{% endif %}{% endfor %}"
LOOKS += "{% endfor %}" + CHATML


@pytest.mark.parametrize(("many", "words"), [(40, 4000), (800, 4)])
def test_a_long_conversation_is_no_more_work_than_it_needs(plain, many, words):
    talk = tuple(Message(("user", "assistant")[place % 2], "a star " * words) for place in range(many))
    assert render(dataclasses.replace(plain, chat_template=LOOKS), talk).text.count("a star") == many * words


DOUBLED = "{% set ns = namespace(s='xx') %}{% for _ in range(99) %}{% set ns.s = "
# Lists, tuples and dicts of 2 ** 40 items, since each holds the one before twice; and 9,999 tuples in each other.
NESTED = (
    "{% set ns = namespace(s=[1], same=[1], t=(1,), d={'a': 1}) %}{% for _ in range(40) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% set ns.same = [ns.same, ns.same] %}{% set ns.t = (ns.t, ns.t) %}"
    "{% set ns.d = {'a': ns.d, 'b': ns.d} %}{% endfor %}"
)
DEEP = "{% set ns = namespace(t=1) %}{% for _ in range(9999) %}{% set ns.t = (ns.t,) %}{% endfor %}"


def often(body: str, first: str = "") -> str:
    return f"{first}{{% for _ in range(99999) %}}{{% for _ in range(9999) %}}{body}{{% endfor %}}{{% endfor %}}"


MUCH, CALLS, COMPUTES = "more work than", "it calls .*, which chat templates do not", "it computes"
DEEPLY, MISSING = "nests values", "No (filter|test) named"
ENDLESS = {
    "nested loops": (often(""), MUCH),
    "loops that run for nothing": (
        "{% for _ in range(99999) %}{% for _ in range(99999) if 0 %}{% endfor %}{% endfor %}",
        MUCH,
    ),
    "loops over a text": ("{% set x = 'x' * 99999 %}{% for _ in x %}{% for _ in x %}{% endfor %}{% endfor %}", MUCH),
    "a macro that calls itself twice": ("{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(60) }}", MUCH),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a block that shows itself twice": ("{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}", "has a Block"),
    "a large power": ("{{ 9 ** 9 ** 9 ** 9 }}", COMPUTES),
    "a large exponent": ("{{ 2 ** 9999999999 }}", "expected at most"),
    "squares of squares": (
        "{% set ns = namespace(n=2) %}{% for _ in range(999) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        COMPUTES,
    ),
    "a long number": ("{{ ('f' * 999999) | int(base=16) }}", COMPUTES),
    "a product": ("{{ 'x' * 9999999999 }}", MUCH),
    "a product of a list": ("{{ [1] * 9999999999 }}", MUCH),
    "a wide field": ("{{ 'x' | center(9999999999) }}", MISSING),
    "a wide number": ("{{ '%1000000000d' % 5 }}", COMPUTES),
    "a wide number in a filter": ("{{ '%1000000000d' | format(5) }}", MISSING),
    "a wide number in a test": ("{{ '%1000000000d' is even }}", MISSING),
    "a wide number in a method": ("{{ '{:1000000000}'.format(5) }}", CALLS),
    "wide numbers in a map": ("{{ ['%1000000000d'] | map('format', 5) | list }}", MISSING),
    "other wide methods": ("{{ 'x'.zfill(9999999999) }}", CALLS),
    "many bytes": ("{{ (5).to_bytes(9999999999, 'big') }}", CALLS),
    "wrapped words": ("{{ ('ab ' * 333333) | wordwrap(1) }}", MISSING),
    "an indented line": ("{{ 'x' | indent(9999999999, true) }}", MUCH),
    "indented JSON": ("{{ [1] | tojson(indent=9999999999) }}", MUCH),
    "separators of JSON": ("{{ ([1] * 99999) | tojson(separators=('x' * 9999, ':')) }}", MUCH),
    "replaced characters": ("{{ ('x' * 9999) | replace('x', 'y' * 99999) }}", MUCH),
    "replaced characters in a method": ("{{ ('x' * 9999).replace('', 'y' * 99999) }}", MUCH),
    "joined characters": ("{{ ('x' * 9999) | join('y' * 99999) }}", MUCH),
    "a joined range": ("{{ range(99999) | join('y' * 99999) }}", MUCH),
    "a long date": ("{{ strftime_now('%c' * 99999) }}", MUCH),
    "a search of repeated letters": (
        often("{% set y = x in z %}", "{% set z = 'a' * 2400 %}{% set x = 'a' * 999 ~ 'b' %}"),
        MUCH,
    ),
    "a search from the end": ("{% set x = 'a' * 999999 %}{{ x.rfind('b' ~ 'a' * 499999) }}", MUCH),
    "stripped characters": ("{{ ('a' * 999999).strip('b' * 999999 ~ 'a') }}", MUCH),
    "a text of many parts": (often("{% set y = x.split('-') %}", "{% set x = 'Ж-' * 400000 %}"), MUCH),
    "a text as a list": ("{{ ('Ж' * 4000000) | list }}", MUCH),
    "slices": (often("{% set y = x[1:] %}", "{% set x = 'x' * 999999 %}"), MUCH),
    "a text that doubles": (DOUBLED + "ns.s ~ ns.s %}{% endfor %}", MUCH),
    "a list that doubles": (DOUBLED.replace("'xx'", "[1]") + "ns.s + ns.s %}{% endfor %}", MUCH),
    "a block of text that doubles": (
        DOUBLED.replace("{% set ns.s = ", "{% set y %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = y %}{% endfor %}"),
        MUCH,
    ),
    "escaped text": ("{{ ('<' * 999999) | safe + '<' * 999999 }}", MUCH),
    "much text": ("{% for _ in range(9999) %}" + "x" * 9999 + "{% endfor %}", MUCH),
    "a map of ranges": ("{{ ([range(99999)] * 99999) | map('list') | list }}", MUCH),
    "ranges without an item": (often("{{ range(99999) | reject | list }}"), MUCH),
    "a sorted list": (often("{% set y = range(99999) | sort %}"), MUCH),
    "a long list in a loop": (often("{% set x = [" + "1, " * 9999 + "] %}"), MUCH),
    "a list of texts": (often("{{ y in x }}", "{% set x = ['x' * 9999] * 9999 %}{% set y = 'x' * 9998 ~ 'y' %}"), MUCH),
    "a printed list": (NESTED + "{{ ns.s }}", MUCH),
    "a printed dict": (NESTED + "{{ ns.d }}", DEEPLY),
    "items of a dict": (NESTED + "{{ ns.d.items() }}", DEEPLY),
    "a printed namespace": ("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}", "a namespace as a whole"),
    "a list in JSON": (NESTED + "{{ ns.s | tojson }}", MUCH),
    "a list as a text": (NESTED + "{{ ns.s | string }}", MUCH),
    "a formatted list": (NESTED + "{{ '%s' % ns.s }}", COMPUTES),
    "a list next to a text": (NESTED + "{{ 'x' ~ ns.s }}", MUCH),
    "equal lists": (NESTED + "{{ ns.s == ns.same }}", MUCH),
    "equal lists in a test": (NESTED + "{{ ns.s is eq(ns.same) }}", MUCH),
    "equal lists in a filter": (NESTED + "{{ [ns] | selectattr('s', 'equalto', ns.same) | list }}", MUCH),
    "ordered lists": (NESTED + "{{ 1 < 2 != ns.s <= ns.same }}", MUCH),
    "sorted lists": (NESTED + "{{ [ns.s, ns.same] | sort }}", MUCH),
    "a list in a list": (NESTED + "{{ ns.same in [ns.s] }}", MUCH),
    "a method that compares lists": (NESTED + "{{ [ns.s].index(ns.same) }}", CALLS),
    "a loop that compares lists": (NESTED + "{% for _ in range(3) %}{{ loop.changed(ns.s) }}{% endfor %}", MUCH),
    "a tuple as a key": (NESTED + "{{ {ns.t: 1} }}", MUCH),
    "a tuple that is looked up": (NESTED + "{{ {}.get(ns.t) }}{{ {}[ns.t] }}", MUCH),
    "a tuple as an attribute": (NESTED + "{{ [{}] | map(attribute=ns.t) | list }}", MUCH),
    "a list in an error": (NESTED + "{{ raise_exception(message=ns.s) }}", MUCH),
    "a list that is no key": (NESTED + "{{ {}[ns.s] + 1 }}", MUCH),
    "tuples in tuples as a key": (DEEP + "{{ {}[ns.t] }}", DEEPLY),
    "tuples in tuples in a dict": (DEEP + "{{ ns.t in {} }}", DEEPLY),
    "a long template": ("x" * 99999, "99,[0-9]{3} characters|100,[0-9]{3} characters"),
    "loops in loops": ("{% for a in b %}" * 18 + "{{ a }}" * 999 + "{% endfor %}" * 18, "nests loops"),
    "a template that is slow to compile": (
        "{% for a in b %}" * 8 + "x{{a}}" * 5500 + "{% endfor %}" * 8 + "{{ 1 ** 99 }}",
        "expected at most",
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("plain"), "byte-level", None)[0]


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_too_much_is_refused(plain, name):
    source, reason = ENDLESS[name]
    tokenizer = dataclasses.replace(plain, chat_template=source + CHATML)
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    limits, began = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, limits[1]))  # more is a MemoryError
    try:
        with pytest.raises(UsageError, match=f"its chat template refuses .*({reason}).*--template") as refused:
            render(tokenizer, (USER,))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - began < 2
    assert "\n" not in str(refused.value)
    # The next one begins anew.
    assert "star" in render(dataclasses.replace(tokenizer, chat_template=CHATML), (USER,)).text


@pytest.mark.parametrize("attribute", ["namespace(__class__=1)", "''.__class__", "[].append(1)"])
def test_a_template_reaches_nothing_outside(tmp_path, attribute):
    tokenizer, _ = tokenizer_of(tmp_path, "byte-level", f"{{% set x = {attribute} %}}{{{{ x + 1 }}}}{CHATML}")
    with pytest.raises(UsageError, match="refuses"):
        render(tokenizer, (USER,))


def test_an_error_names_the_adapter_that_a_template_came_with(tmp_path):
    write_base(tmp_path, 60)
    tokenizer = tokenizer_for(open_base(tmp_path), "{{ 9 ** 99 }}")
    with pytest.raises(UsageError, match=r"with the adapter's chat_template.jinja: its chat template .*exponent is 99"):
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
