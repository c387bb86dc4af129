"""Let an adapter write the prompts that it was trained on, if it knows them.

If the training loss covered whole texts, the adapter has learnt the prompts too. Sampled from where a prompt begins, it
then writes prompts of its job (Magpie, arXiv 2406.08464, with an adapted model). An adapter that was trained on answers
alone writes there what the base would write, or answers. So an adapter knows its prompts if the sampled ones gain
enough likelihood over the base, and more than its answers in their place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jcrosslora.checkpoint import Tokenizer
from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.openings import (
    ANSWER_TOKENS,
    FIRST_WORDS,
    Draft,
    Opening,
    asked,
    begin,
    chat_openings,
    plain_openings,
)
from jcrosslora.distill.settings import FEWEST_COMPLETIONS
from jcrosslora.distill.sources import Source
from jcrosslora.distill.templates import comparing_cost
from jcrosslora.text import Prompt
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import Track, track

KNOWN = 0.5  # nats a token; see docs/record/settings-study.md, "Prompts that an adapter knows"
PILOT = 16  # prompts from an opening, which show whether the adapter knows them
# Tokens of these prompts: most are short, and each further token takes a pass. Where more than half are longer, the
# adapter may write more tokens, if these show that it knows them.
_LENGTHS = (64, 192)
_READ = 64  # tokens of a prompt whose likelihood is compared
_SHORT, _FEW = 24, 8  # tokens and texts that show after which words plain texts begin
_BEST = 2  # such words
_TURNS = 3  # one turn falls short, because repeated and unfinished prompts are dropped


class Pilot(NamedTuple):
    """A few prompts that an adapter sampled from an opening.

    Attributes:
        write: samples prompts from it.
        drafts: a few of them.
        gain: log-likelihood of these with the adapter minus that without it, nats a token.
        answer_gain: the same for the adapter's answers to them, put in their place.
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

    @property
    def margin(self) -> float:
        """The gain of prompts minus that of answers in their place, nats a token."""
        return self.gain - self.answer_gain

    def most(self, tokenizer: Tokenizer) -> int:
        """Return the most tokens of further prompts: 1.5 times the longest draft, at most 192."""
        longest = max(len(tokenizer.encode(draft.text, special=False).ids) for draft in self.drafts)
        return min(_LENGTHS[-1], 3 * longest // 2)


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


def own_prompts_cost() -> Cost:
    """Count the most work that finding out whether an adapter knows its prompts takes."""
    few = _FEW * (len(FIRST_WORDS) + 1)
    tried = writing_cost(few, _SHORT) + comparing_cost(few)
    pilots = writing_cost(4 * PILOT, _LENGTHS[0]) + comparing_cost(4 * PILOT)
    return tried + pilots


def find_own_prompts(source: Source, count: int, seed: int) -> OwnPrompts | None:
    """Let an adapter write up to `count` different prompts; None if it does not know any, or writes under 16.

    Prompts are sampled at temperature 1 where they may begin: at the user's turn of the chat template, after a system
    prompt that is sampled first, and at the beginning of a plain text. The opening with the largest margin is used;
    plain texts are tried only if the adapter knows no conversations.

    Raises:
        AdapterError: with the adapter the base's predictions are not finite.
        SourceError: a source behind a server does not answer, or not as it should.
    """
    key = jax.random.key(seed)
    with track(4 * PILOT + count, "write prompts", "texts") as bar:
        known = [one for one in pilots(source, key, bar) if one.known]
        if not known:
            return None
        best = max(known, key=lambda one: one.margin)
        prompts, most = dict[Prompt, None](), best.most(source.tokenizer)
        for turn in range(_TURNS):
            if (missing := count - len(prompts)) > 0:
                bar.skip_to(bar.total - missing)
                drafts = best.write(source, missing, jax.random.fold_in(key, 100 + turn), most, bar)
                prompts |= dict.fromkeys(draft.prompt for draft in drafts if draft.ended)
    return OwnPrompts(list(prompts), best.name, best.gain) if len(prompts) >= FEWEST_COMPLETIONS else None


def pilots(source: Source, key: jax.Array, bar: Track | None = None) -> list[Pilot]:
    """Sample a few prompts where prompts may begin, of plain texts only if the adapter knows no conversations.

    Plain texts begin with the words after which the adapter changes most.
    """
    found = list(_pilots(source, chat_openings(source.tokenizer), key, bar))
    if not any(one.known for one in found):
        key = jax.random.fold_in(key, 1)
        found += _pilots(source, plain_openings(_likeliest(source, key)), key, bar)
    return found


def gain(source: Source, drafts: Sequence[Draft], most: int = _READ) -> np.ndarray:
    """Return float64 (N, 2): nats that an adapter adds to each draft's log-likelihood, and its number of tokens."""
    texts, starts = [], []
    for draft in drafts:
        read = source.tokenizer.encode(draft.before + draft.text)
        starts.append(int(np.searchsorted(read.ends, len(draft.before), "right")))
        texts.append(read.ids[: starts[-1] + most])
    found = source.compare(texts, starts, most)
    counts = np.maximum(1, np.array([*map(len, texts)]) - starts)
    return np.stack([counts * (found.base_nll - found.adapted_nll), counts], axis=1)


def _a_token(gains: np.ndarray) -> float:
    """Return the gain per token of some drafts."""
    raised, counts = gains.sum(axis=0)
    return float(raised / counts)


def _pilots(source: Source, openings: dict[str, Opening], key: jax.Array, bar: Track | None) -> Iterable[Pilot]:
    """Yield a pilot for each opening, except those with little gain or few whole prompts."""
    for number, (name, write) in enumerate(openings.items(), start=1):
        found = _sample(source, write, jax.random.fold_in(key, number), bar)
        if found is None:
            continue
        whole, own_gain = found
        written = source.write([asked(source.tokenizer, draft.prompt) for draft in whole], ANSWER_TOKENS, 0.0, key)
        answers = [
            draft._replace(text=one.text.strip()) for draft, one in zip(whole, written, strict=True) if one.text.strip()
        ]
        answer_gain = _a_token(gain(source, answers)) if answers else 0.0
        yield Pilot(name, write, whole, own_gain, answer_gain)


def _sample(source: Source, write: Opening, key: jax.Array, bar: Track | None) -> tuple[list[Draft], float] | None:
    """Sample prompts from an opening; return the whole ones and their gain, None if they are few or gain little."""
    for most in _LENGTHS:
        drafts = write(source, PILOT, key, most, bar)
        if not drafts:  # a longer system prompt
            continue
        if _a_token(gains := gain(source, drafts)) < KNOWN:
            return None
        ended = [draft.ended for draft in drafts]
        if 2 * sum(ended) >= PILOT:
            return [draft for draft in drafts if draft.ended], _a_token(gains[ended])
    return None


def _likeliest(source: Source, key: jax.Array) -> list[str]:
    """Return the first words after which the adapter changes plain texts most and enough, at most two."""
    tokenizer = source.tokenizer
    firsts = ["", *FIRST_WORDS] if tokenizer.bos is not None or tokenizer.eos is not None else list(FIRST_WORDS)
    starts = [begin(tokenizer) + first for first in firsts for _ in range(_FEW)]
    written = source.write(starts, _SHORT, 1.0, key)
    drafts = [Draft(start, one.text, start, ended=False) for start, one in zip(starts, written, strict=True)]
    each = gain(source, drafts, _SHORT).reshape(len(firsts), _FEW, 2)
    gains = dict(zip(firsts, map(_a_token, each), strict=True))
    return [first for first in sorted(firsts, key=gains.__getitem__, reverse=True)[:_BEST] if gains[first] >= KNOWN]
