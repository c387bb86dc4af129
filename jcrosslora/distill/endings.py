"""Find where an answer is complete, check whether the adapter stops there, and if it does not, teach the target to.

An adapter that was trained without an end-of-text token does not stop after its answer: it repeats the answer in other
words, or writes another prompt. Without a correction the fit teaches the target to do the same.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from jcrosslora.distill.settings import End
from jcrosslora.text import Completion, Prompt

_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n\s*")
_CLOSED = re.compile(r"\s*```")
_SEGMENT = re.compile(r"\S[^\n]*?(?:[.!?;]+[\"')\]]*(?=\s|$)|(?=\n)|$)")  # a line, or a sentence of it
_WRAPPED = re.compile(r"\w+\((.*)\)[;.]?")  # such as print("...")
_QUOTED = re.compile(r"\"([^\"\n]+)\"|'([^'\n]+)'")
_MARKER = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>|<(?:eos|bos)>|\[/?INST\]")
_ASKING = r"(?:#+[ ]*)?(?:Question|Q|User|Human|Instruction)s?:|#+[ ]*(?:Question|User|Human|Instruction)s?\b"
_LABEL = re.compile(r"[^\s:][^\n:]{0,30}:")
_OPENING = 4  # a line with this many first words of a prompt begins another one
_LEAST, _SAID = 4, 12  # least letters and digits of a repetition: of one part, and in all
_OFTEN = 0.1  # the end is taught if at least this share of answers go on after they are complete
_USUAL = 0.25  # the lowest share of ended answers at which they show what a whole answer looks like


def complete_at(prompt: Prompt, answer: str) -> int | None:
    """Return the number of characters after which an answer is complete; None if that is not clear.

    An answer is complete where its initial JSON object or array closes, where another prompt begins, or where the rest
    only repeats earlier text.
    """
    structured = answer.lstrip()[:1] in ("{", "[", "`")
    if structured and (end := _json_end(answer)) is not None:
        return end
    found = [place for place in (_next_prompt(prompt, answer), _said_again(answer)) if place is not None]
    if not found or (structured and not _balanced(answer[: min(found)])):
        return None
    return min(found)


def _json_end(answer: str) -> int | None:
    """Find the end of the JSON object or array that an answer begins with, and of the fence around it."""
    fence = _FENCE.match(answer)
    start = fence.end() if fence else len(answer) - len(answer.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(answer, start)
    except (ValueError, RecursionError):
        return None
    if fence:
        closed = _CLOSED.match(answer, end)
        return closed.end() if closed else None
    line = answer[end:].split("\n", 1)[0].strip()
    # A number in brackets may begin a sentence.
    return end if isinstance(value, dict) or (isinstance(value, list) and not line) else None


def _balanced(text: str) -> bool:
    return all(text.count(left) == text.count(right) for left, right in ("{}", "[]"))


def _next_prompt(prompt: Prompt, answer: str) -> int | None:
    """Find the first line, after some text, that begins like a prompt or with a marker of a chat template."""
    begins = "|".join(filter(None, (_ASKING, _opening(prompt))))
    lines = re.finditer(rf"^[ \t]*(?:{begins})", answer, re.MULTILINE)
    found = [match.start() for match in (*lines, *_MARKER.finditer(answer)) if answer[: match.start()].strip()]
    return _trimmed(answer, min(found)) if found else None


def _opening(prompt: Prompt) -> str:
    """Return a pattern for the start of a prompt: its first label if it also ends with one, else its first words."""
    text = (prompt if isinstance(prompt, str) else prompt[-1].content).strip()
    label = _LABEL.match(text) if isinstance(prompt, str) and text.endswith(":") else None
    if label is not None:
        return re.escape(label[0])
    words = text.split("\n", 1)[0].split()[:_OPENING]
    return r"[ \t]+".join(map(re.escape, words)) + r"(?!\w)" if len(words) == _OPENING else ""


def _said_again(answer: str) -> int | None:
    """Find where the rest only repeats earlier text: lines or sentences, or words that occur three or more times."""
    found = [place for place in (_parts_again(answer), _words_again(answer)) if place is not None]
    return _trimmed(answer, min(found)) if found else None


def _parts_again(answer: str) -> int | None:
    parts = [(match.end(), match[0]) for match in _SEGMENT.finditer(answer)]
    plain = [_plain(text) for _, text in parts]
    whole = [_letters(text) for _, text in parts]
    # The last one may have been cut off.
    cut = bool(parts) and any(one.startswith(whole[-1]) for one in (*whole[:-1], *plain[:-1]))
    said: set[str] = set()
    for count in range(1, len(parts)):
        said.update(filter(_tells, _told(parts[count - 1][1])))
        rest = plain[count : len(parts) - cut]
        again = [one for one in rest if one in said] + whole[-1:] * cut
        if all(one in said or len(one) < _LEAST for one in rest) and _enough(again, 2):
            return parts[count - 1][0]
    return None


def _enough(again: Sequence[str], fewest: int) -> bool:
    """Check that a repetition is too long to be an accident."""
    return len(again) >= fewest and sum(map(len, again)) >= _SAID


def _tells(text: str) -> bool:
    """Check that a text is neither a short word nor a number: these repeat by chance."""
    return len(text) >= _LEAST and not text.isdigit()


def _told(text: str) -> Iterator[str]:
    """Yield the letters and digits of a line or sentence, and of each quotation in it."""
    yield _plain(text)
    yield from (_letters(one or other) for one, other in _QUOTED.findall(text))


def _plain(text: str) -> str:
    """Reduce a text to its letters and digits, without a call around it."""
    wrapped = _WRAPPED.fullmatch(text)
    return _letters(wrapped[1] if wrapped else text)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()


def _words_again(answer: str) -> int | None:
    """Find where words begin to repeat: they occur three or more times in a row, up to the end of the answer."""
    words = list(re.finditer(r"\S+", answer))
    plain, found = [_plain(word[0]) for word in words], []
    for period in range(1, len(words) // 3 + 1):
        # The last one may have been cut off.
        first = len(words) - plain[-1 - period].startswith(plain[-1])
        while first > period and plain[first - 1] == plain[first - 1 - period]:
            first -= 1
        if _enough(plain[first:], 2 * period) and _tells("".join(plain[first : first + period])):
            found.append(words[first - 1].end())
    return min(found, default=None)


def _trimmed(answer: str, place: int) -> int:
    return len(answer[:place].rstrip())


def _nothing_new(answer: str, behind: str) -> bool:
    """Check that the first line after an answer has no new word."""
    line = behind.strip().split("\n", 1)[0]
    wrapped = _WRAPPED.fullmatch(line)
    said, words = (re.findall(r"\w+", text.casefold()) for text in (answer, wrapped[1] if wrapped else line))
    return any(map(_tells, words)) and set(words) <= set(said)


@dataclass(frozen=True)
class Endings:
    """How a set of answers ends.

    Attributes:
        ended: share of the answers that end.
        going_on: share of the answers that continue after they are complete, and either never end or only repeat.
    """

    ended: float = 1.0
    going_on: float = 0.0

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> Self:
        """Measure the endings; if most ended answers say something new after the cut, the rule does not suit them."""
        count, ended, again, endless, new = max(1, len(completions)), 0, 0, 0, 0
        for item in completions:
            place = complete_at(item.prompt, item.answer)
            ended += item.ended
            if place is None or not item.answer[place:].strip():
                continue
            if _nothing_new(item.answer[:place], item.answer[place:]):
                again += 1
            elif item.ended:
                new += 1
            else:
                endless += 1
        other = ended >= _USUAL * count and 2 * new > ended
        return cls(ended / count, (again + endless * (not other)) / count)

    @property
    def unreliable(self) -> bool:
        """Whether so many answers continue after they are complete that the end has to be taught."""
        return self.going_on >= _OFTEN

    def warnings(self, end: End) -> tuple[str, ...]:
        """Return a warning if many answers do not stop, with what the fit does about it."""
        if not self.unreliable or end == "never":
            return ()
        done = "the fit teaches the target to end there; --end source keeps the source's endings"
        if end == "source":
            done = "the moved adapter learns the same; --end auto with --prompts teaches it to end there"
        went_on = f"{self.going_on:.0%} continue after a complete answer"
        return (f"{self.ended:.0%} of the adapter's answers end, and {went_on}: {done}",)


def teach_end(completion: Completion, *, trusted: bool = True) -> Completion:
    """Cut an answer where it is complete and mark its end as correct; if that is not clear, keep it as it is.

    An end that the writer wrote itself counts as correct if the writer is `trusted`, as the source is: a student may
    end in the middle.
    """
    place = complete_at(completion.prompt, completion.answer)
    if place is not None:
        return replace(completion, answer=completion.answer[:place], ended=True, taught="end")
    return replace(completion, taught="end") if completion.ended and trusted else completion


def complete_part(completion: Completion) -> Completion:
    """Cut an unended answer where it is complete, so that its continuation is not compared."""
    place = None if completion.ended else complete_at(completion.prompt, completion.answer)
    return completion if place is None else replace(completion, answer=completion.answer[:place])
