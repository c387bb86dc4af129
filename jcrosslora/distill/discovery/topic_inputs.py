"""Inputs about what the adapter speaks of, and the best of those that were answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jcrosslora.distill.discovery.job_kinds import JobKind
from jcrosslora.distill.discovery.requests import ask_about, resemble
from jcrosslora.distill.discovery.scores import Scored, best_of
from jcrosslora.distill.discovery.topics import choose_topics, doubted_subjects, is_about, parts_of, topic_of
from jcrosslora.distill.sources.protocol import Writer
from jcrosslora.utils.progress import Track

EXAMPLES = 12  # best requests, which are shown to the writer
_FEWEST_FITTING = 6  # requests answered as they were meant, for no others to be shown


def write_inputs(
    writer: Writer,
    kind: JobKind,
    examples: Sequence[Scored],
    answered: Sequence[Scored],
    about: Mapping[str, str],
    count: int,
    seed: int,
    bar: Track | None,
    heard: Sequence[tuple[str, str]] = (),
) -> dict[str, str]:
    """Write at most `count` inputs about what the adapter speaks of; like the examples, if it speaks of nothing.

    Inputs that are like others drift away from what the adapter was trained on, as it answers all that is asked. Its
    answers stay there: what they speak of lies nearer.

    Args:
        writer: of the inputs.
        kind: whose inputs they are; its own examples are shown beside the others.
        examples: the best requests.
        answered: the topics are of the better half of these answers, and of those that were as they were meant.
        about: the topics of their requests, by the inputs, as far as these had any.
        count: the most inputs.
        seed: of the sampling.
        bar: advances by one for each.
        heard: further answers with such topics, each behind its input, "" if there is none.

    Returns:
        The topics by the inputs, "" without one.
    """
    fitting = _fitting(kind, answered, about)
    told = dict.fromkeys([*best_of(answered, -(-len(answered) // 2)), *fitting])
    parts = parts_of([*heard, *_asked(kind, list(told))])
    shown = [*kind.examples, *_asked(kind, examples)]
    known = [(text, topic_of(own)) for (text, _), own in zip(shown, parts_of(shown), strict=True) if own]
    chosen = choose_topics(parts, count, seed, doubted_subjects(_asked(kind, answered), about)) if known else []
    if chosen:
        return ask_about(writer, chosen, known, seed, bar)
    return dict.fromkeys(resemble(writer, [text for text, _ in shown], count, seed, bar), "")


def choose_examples(kind: JobKind, answered: Sequence[Scored], about: Mapping[str, str]) -> list[Scored]:
    """Take the best requests: those that were answered by what they are about, if there are several."""
    fitting = _fitting(kind, answered, about)
    return best_of(fitting if len(fitting) >= _FEWEST_FITTING else answered, EXAMPLES)


def _fitting(kind: JobKind, answered: Sequence[Scored], about: Mapping[str, str]) -> list[Scored]:
    """Keep requests that were answered by what they are about."""
    asked = zip(answered, _asked(kind, answered), strict=True)
    return [one for one, (text, answer) in asked if is_about(answer, about.get(text, ""))]


def _asked(kind: JobKind, answered: Sequence[Scored]) -> list[tuple[str, str]]:
    return [(kind.input_of(one.text), one.item.answer) for one in answered]
