"""Let an adapter write the prompts that it was trained on, if it knows them.

Where the loss of a training covered whole texts, the adapter has learnt the prompts too. Sampled from where a prompt
begins, it then writes prompts of its job (Magpie, arXiv 2406.08464, with an adapted model). An adapter that was trained
on answers alone writes texts as the base does, or answers, there. So two figures show whether it knows its prompts: the
gain in likelihood of the sampled prompts over the base, and that this is above the gain of its answers in their place.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import numpy as np

from jcrosslora.checkpoint import Tokenizer
from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.settings import FEWEST_COMPLETIONS
from jcrosslora.distill.sources import Source
from jcrosslora.distill.templates import comparing_cost, without_bos
from jcrosslora.errors import UsageError
from jcrosslora.text import Message, Prompt, render
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import Track, track

KNOWN = 0.5  # nats a token; see docs/record/settings-study.md, "Prompts that an adapter knows"
PILOT = 16  # prompts from an opening, which show whether the adapter knows them
_TOKENS = 192  # of a message, or of a plain text with its answer
_ANSWER = 48  # tokens of an answer that are read
_SHORT, _FEW = 24, 8  # tokens and texts that show after which words plain texts begin
_READ = 128  # tokens of a prompt whose likelihood is compared
_TURNS = 3  # repeated prompts and unfinished ones are left out, so that one turn falls short
_COMMON = 0.75  # share of plain texts that have the line before the answer
_LINE = re.compile(r"(?:\A|\n+)[^\n:]{1,40}:\n?")  # such as "Answer:"
_FIRST_WORDS = (  # of common plain formats, for bases without a token that begins a text
    *("Question:", "Q:", "User:", "### Instruction:", "Instruction:", "Input:", "Problem:", "Task:", "Text:"),
    *("Human:", "Context:", "Command:", "Message:", "Query:", "Request:", "Title:", "Sentence:", "Document:"),
)
_SYSTEM, _QUESTION = Message("system", "Instruction"), Message("user", "Question")


class Draft(NamedTuple):
    """A prompt that was sampled.

    Attributes:
        before: the text that it follows.
        text: what was sampled.
        prompt: the two as a prompt.
    """

    before: str
    text: str
    prompt: Prompt


class Opening(Protocol):
    """Samples prompts of at most `most` tokens where prompts may begin; leaves out those that do not end."""

    def __call__(  # noqa: D102
        self, source: Source, count: int, key: jax.Array, bar: Track | None = None, most: int = _TOKENS
    ) -> list[Draft]: ...


class Pilot(NamedTuple):
    """What an adapter makes of an opening.

    Attributes:
        write: samples prompts from it.
        drafts: a few of them.
        gain: log-likelihood of these with the adapter minus that without it, nats a token.
        answer_gain: that of the adapter's answers to them, in their place.
    """

    name: str
    write: Opening
    drafts: list[Draft]
    gain: float
    answer_gain: float

    @property
    def known(self) -> bool:
        """Whether the adapter knows prompts that begin here."""
        return self.gain >= KNOWN and self.margin > 0

    def most(self, tokenizer: Tokenizer) -> int:
        """Return how many tokens further prompts may have: half more than the longest of these."""
        longest = max(len(tokenizer.encode(draft.text, special=False).ids) for draft in self.drafts)
        return min(_TOKENS, 3 * longest // 2)

    @property
    def margin(self) -> float:
        """The gain of prompts minus that of answers in their place, nats a token."""
        return self.gain - self.answer_gain


@dataclass(frozen=True, eq=False)
class OwnPrompts:
    """Prompts that an adapter wrote.

    Attributes:
        prompts: different ones, in the order in which they were written.
        opening: the name of the place where they begin.
        gain: log-likelihood of their tokens with the adapter minus that without it, nats a token.
    """

    prompts: list[Prompt]
    opening: str
    gain: float


def own_prompts_cost(count: int) -> Cost:
    """Count the work of a search for `count` prompts, at most."""
    few = writing_cost(_FEW * (len(_FIRST_WORDS) + 1), _SHORT)
    pilots = writing_cost(4 * PILOT, _TOKENS) + comparing_cost(4 * PILOT)
    return few + pilots + writing_cost(count, _TOKENS // 4)


def find_own_prompts(source: Source, count: int, seed: int) -> OwnPrompts | None:
    """Let an adapter write `count` different prompts; return None if it does not know those that it was trained on.

    Prompts are sampled at temperature 1 where they may begin: at the user's turn of the chat template, after a system
    prompt that is sampled first, and at the beginning of a plain text. The opening with the largest margin is used, of
    plain texts only where the adapter knows no conversations.

    Raises:
        AdapterError: with the adapter the base's predictions are not finite.
        SourceError: a source behind a server does not answer, or not as it should.
    """
    key = jax.random.key(seed)
    with track(6 * PILOT + count, "write prompts", "texts") as bar:
        known = [one for one in chat_pilots(source, key, bar) if one.known]
        known = known or [one for one in plain_pilots(source, jax.random.fold_in(key, 1), bar) if one.known]
        if not known:
            return None
        best = max(known, key=lambda one: one.margin)
        prompts, most = dict[Prompt, None](), best.most(source.tokenizer)
        for turn in range(_TURNS):
            if (missing := count - len(prompts)) > 0:
                bar.skip_to(bar.total - missing)
                drafts = best.write(source, missing, jax.random.fold_in(key, 100 + turn), bar, most)
                prompts |= dict.fromkeys(draft.prompt for draft in drafts)
    return OwnPrompts(list(prompts), best.name, best.gain) if len(prompts) >= FEWEST_COMPLETIONS else None


def gain(source: Source, drafts: Sequence[Draft]) -> float:
    """Compute the log-likelihood of drafts with the adapter minus that without it, nats a token over all of them."""
    texts, starts, counts = [], [], []
    for draft in drafts:
        read = source.tokenizer.encode(draft.before + draft.text)
        start = int(np.searchsorted(read.ends, len(draft.before), "right"))
        texts.append(read.ids[: start + _READ])
        starts.append(start)
        counts.append(max(1, len(texts[-1]) - start))
    found = source.compare(texts, starts, _READ)
    return float(np.average(found.base_nll - found.adapted_nll, weights=counts))


def cut_at_line(texts: Sequence[str]) -> list[str]:
    """Cut texts where their answers begin: after the last line up to a colon that most of them have, as "Answer:".

    Where such a line comes again, the next prompt begins. Texts without such a line are left out.
    """
    found = [[(one[0].strip(), one.end()) for one in _LINE.finditer(text)] for text in texts]
    common = Counter(line for lines in found for line in {name for name, _ in lines})
    known = {line for line, times in common.items() if times >= _COMMON * len(texts)}
    cut = []
    for text, lines in zip(texts, found, strict=True):
        first: dict[str, int] = {}
        for name, end in lines:
            if name in first:
                break
            first[name] = end
        ends = [end for name, end in first.items() if name in known and end > len(name) + 1]
        cut += [text[: max(ends)]] if ends else []
    return cut


def chat_pilots(source: Source, key: jax.Array, bar: Track | None = None) -> list[Pilot]:
    """Sample a few prompts from the turns of the chat template where a prompt may begin."""
    openings: list[tuple[str, Opening]] = []
    if _turn_ends(source.tokenizer, (_QUESTION,)):
        openings.append(("the user's turn of its chat template", _user_turns))
        if _turn_ends(source.tokenizer, (_SYSTEM, _QUESTION)):
            openings.append(("the system's turn of its chat template", _system_turns))
    return _pilots(source, openings, key, bar)


def plain_pilots(source: Source, key: jax.Array, bar: Track | None = None) -> list[Pilot]:
    """Sample a few plain texts from the two beginnings after which the adapter changes most."""
    tokenizer = source.tokenizer
    firsts = ["", *_FIRST_WORDS] if tokenizer.bos is not None or tokenizer.eos is not None else list(_FIRST_WORDS)
    names = {
        first: f"texts that begin with {first!r}" if first else "the beginning of a text"
        for first in _likeliest(source, firsts, key)
    }
    return _pilots(source, [(name, partial(_plain_texts, first)) for first, name in names.items()], key, bar)


def _pilots(source: Source, openings: Sequence[tuple[str, Opening]], key: jax.Array, bar: Track | None) -> list[Pilot]:
    """Sample from openings, and answer what they give; openings that give little are left out."""
    found = []
    for number, (name, write) in enumerate(openings, start=1):
        drafts = write(source, PILOT, jax.random.fold_in(key, number), bar)
        if 2 * len(drafts) < PILOT:
            continue
        asked = [_asked(source.tokenizer, draft.prompt) for draft in drafts]
        written = source.write(asked, _ANSWER, 0.0, key)
        answers = [
            draft._replace(text=one.text.strip())
            for draft, one in zip(drafts, written, strict=True)
            if one.text.strip()
        ]
        found.append(Pilot(name, write, drafts, gain(source, drafts), gain(source, answers) if answers else 0.0))
    return found


def _likeliest(source: Source, firsts: Sequence[str], key: jax.Array) -> list[str]:
    """Return the two first words after which the adapter changes what follows most."""
    starts = [_begin(source.tokenizer) + first for first in firsts for _ in range(_FEW)]
    written = source.write(starts, _SHORT, 1.0, key)
    drafts = [Draft(start, one.text, start) for start, one in zip(starts, written, strict=True)]
    gains = [gain(source, drafts[place : place + _FEW]) for place in range(0, len(drafts), _FEW)]
    return [firsts[int(place)] for place in np.argsort(gains)[::-1][:2]]


def _user_turns(
    source: Source, count: int, key: jax.Array, bar: Track | None = None, most: int = _TOKENS
) -> list[Draft]:
    """Sample messages of the user, after the system prompt that the template adds, if any."""
    return _messages(source, [()] * count, key, bar, most)


def _system_turns(
    source: Source, count: int, key: jax.Array, bar: Track | None = None, most: int = _TOKENS
) -> list[Draft]:
    """Sample system prompts, and messages of the user after them; many messages share a few system prompts."""
    before = _before(source.tokenizer, (_SYSTEM, _QUESTION), 0)
    written = source.write([before] * min(count, PILOT), most, 1.0, key)
    systems = [(Message("system", one.text.strip()),) for one in written if one.ended and one.text.strip()]
    systems = (systems * count)[: count * len(systems) // len(written)]
    found = []
    for draft in _messages(source, systems, jax.random.fold_in(key, 1), bar, most):
        asked, user = _asked(source.tokenizer, draft.prompt), draft.prompt[-1:]
        usual = _asked(source.tokenizer, user) == asked  # the template adds this system prompt itself
        text = (draft.before + draft.text)[len(before) :]
        found.append(Draft(before, text, user if usual else draft.prompt))
    return found


def _plain_texts(
    first: str, source: Source, count: int, key: jax.Array, bar: Track | None = None, most: int = _TOKENS
) -> list[Draft]:
    """Sample whole texts that begin with `first`, and cut them after the line before the answer."""
    before, most = _begin(source.tokenizer) + first, min(_TOKENS, most + _ANSWER)
    written = source.write([before] * count, most, 1.0, key, bar=bar)
    prompts = cut_at_line([first + one.text for one in written])
    return [Draft(before, prompt.removeprefix(first), prompt) for prompt in prompts]


def _messages(
    source: Source, systems: Sequence[tuple[Message, ...]], key: jax.Array, bar: Track | None, most: int
) -> list[Draft]:
    """Sample a message of the user after each of some system prompts, none or one message each."""
    starts = [_before(source.tokenizer, (*system, _QUESTION), len(system)) for system in systems]
    written = source.write(starts, most, 1.0, key, bar=bar) if starts else []
    return [
        Draft(before, one.text, (*system, Message("user", one.text.strip())))
        for before, system, one in zip(starts, systems, written, strict=True)
        if one.ended and one.text.strip()
    ]


def _begin(tokenizer: Tokenizer) -> str:
    """Return the text that a new text follows; writers add the token that begins a text themselves."""
    return "" if tokenizer.bos is not None else tokenizer.eos_name


def _before(tokenizer: Tokenizer, messages: tuple[Message, ...], number: int) -> str:
    """Return the text before the content of a message, without the token that begins a text."""
    rendered = render(tokenizer, messages, ask=True)
    return without_bos(tokenizer, rendered.text[: rendered.spans[number][0]])


def _asked(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """Return the text that an answer to a prompt follows, without the token that begins a text."""
    if isinstance(prompt, str):
        return prompt
    return without_bos(tokenizer, render(tokenizer, prompt, ask=True).text)


def _turn_ends(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> bool:
    """Whether a chat template takes the messages, and ends the first with a token at which writing ends."""
    if tokenizer.chat_template is None:
        return False
    try:
        rendered = render(tokenizer, messages, ask=True)
    except UsageError:
        return False
    behind = tokenizer.encode(rendered.text[rendered.spans[0][1] :], special=False).ids
    return behind.size > 0 and int(behind[0]) in tokenizer.stops
