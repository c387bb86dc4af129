"""Prompts in files: whatever is written is read, and one line says what cannot be read."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jcrosslora import Probes
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.examples import read_prompts
from jcrosslora.session.transfer import given_probes
from jcrosslora.text import Message

any_text = st.text(st.characters(codec="utf-8")).filter(lambda text: text.strip())
one_line = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0\ufeff")).filter(lambda text: text.strip())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


@given(texts=st.lists(any_text, min_size=1))
def test_json_lines_are_read_back(folder, texts):
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (folder / "texts.jsonl").write_bytes("\n".join(lines).encode())
    assert read_prompts(folder / "texts.jsonl") == texts


@given(texts=st.lists(one_line, min_size=1))
def test_lines_are_read_back(folder, texts):
    (folder / "texts.txt").write_bytes("\n".join(texts).encode())
    assert read_prompts(folder / "texts.txt") == texts


def test_bom_and_line_endings_of_other_programs_are_read(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufefffirst line\r\n\r\n  second ü \n   \nlast".encode())
    assert read_prompts(path) == ["first line", "  second ü ", "last"]
    path = tmp_path / "notes.JSONL"
    path.write_bytes('\ufeff{"text": "a\\nb", "id": 3}\r\n\n{"text": " "}\n{"text": "c"}'.encode())
    assert read_prompts(str(path)) == ["a\nb", "c"]


def test_a_text_file_may_hold_other_json(tmp_path):
    lines = ['{"name": "Blue Spice"}', '{"text": "a"} to a sentence', '{"text": "a"}']
    path = tmp_path / "facts.txt"
    path.write_text("\n".join(lines))
    assert read_prompts(path) == lines


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\r\n\t\n", "no text"),
        ("model.gguf", b"GGUF\x03\0\0\0text", "binary"),
        ("latin.txt", b"na\xefve", "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl:2"),
        ("list.jsonl", b'["text"]', "list.jsonl:1"),
        ("number.jsonl", b'{"text": 3}', "number.jsonl:1"),
        ("other.jsonl", b'{"question": "a"}', "other.jsonl:1"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl:1"),
        ("digits.jsonl", b"1" * 10_000, "digits.jsonl:1"),
        ("half.jsonl", b'{"text": "\\ud800"}', "half.jsonl:1"),
        ("chats.txt", b'{"messages": []}\n\n {"prompt": "a"}\r\n', "rename it to .jsonl"),
    ],
)
def test_files_without_texts_are_refused(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_prompts(tmp_path / name)
    assert name in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path, tmp_path / "none.txt" / "inside.txt"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_prompts(path)


def test_description_names_source_count_and_digest():
    probes = Probes(("one", "two"), "written by B at temperature 1", 7, positions=31)
    said = probes.describe()
    for part in ("2 texts", "written by B at temperature 1", "seed 7", "31 matched", probes.digest()[:12]):
        assert part in said
    assert "\n" not in said
    assert Probes(("onetwo",), "given").digest() != probes.digest()
    assert "seed" not in Probes(("one",), "given").describe()
    assert Probes(("one", "two"), "given").digest() == probes.digest()


ANSWER_ALONE = [{"role": "assistant", "content": "a"}]


def test_a_conversation_without_a_message_of_the_user_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": ANSWER_ALONE}))
    cases = (str(path), f"{path}:1"), ([ANSWER_ALONE], "prompt 0"), (["text", {"messages": []}], "prompt 1")
    for prompts, place in cases:
        with pytest.raises(UsageError, match=f"^{re.escape(place)}: "):
            given_probes(prompts)


def test_conversations_and_texts_are_prompts_without_their_answers(tmp_path):
    user = {"role": "user", "content": "u"}
    lines = [{"messages": [user, *ANSWER_ALONE]}, {"text": "t"}, {"prompt": "p"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    wanted = ((Message("user", "u"),), "t", "p")
    assert given_probes(str(path)).prompts == wanted
    assert given_probes([[user, *ANSWER_ALONE], "t", "p"]).prompts == wanted
