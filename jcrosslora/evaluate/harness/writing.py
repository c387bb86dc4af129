"""Generation for lm-evaluation-harness: which prompts are continued together, and where a text ends."""

from collections.abc import Sequence

import jax

from jcrosslora.decoder import Generator
from jcrosslora.evaluate.harness.options import Options

_BLOCK = 16  # tokens between two looks for stop strings
_NARROWEST = 8  # tokens of a prompt's row


def generate(generator: Generator, prompts: Sequence[Sequence[int]], options: Options, key: jax.Array) -> list[str]:
    """Continue prompts in one batch, which ends soon after its last stop string.

    Args:
        generator: the base with its adapter.
        prompts: token ids, none empty.
        options: where to end.
        key: from `jax.random.key`.

    Returns:
        The texts, without stop strings and special tokens.

    Raises:
        AdapterError, CheckpointError: see `Generator.continue_tokens`.
    """
    # Powers of two, since every further shape has to be compiled.
    shape = _rounded(len(prompts)), max(_NARROWEST, _rounded(max(map(len, prompts))))
    rows = generator.continue_tokens(
        prompts, options.length, options.temperature, key, shape=shape, block=_BLOCK, until=options.until
    )
    return [_until(generator.tokenizer.decode(row), options.until) for row in rows]


def group_prompts(prompts: Sequence[tuple[list[int], Options]], batch_tokens: int) -> list[tuple[Options, list[int]]]:
    """Group the indices of prompts that are continued together: those with the same options, the longest first.

    Args:
        prompts: token ids and options.
        batch_tokens: token positions in memory at once; a batch has one prompt or more.
    """
    by_options: dict[Options, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index][0])):
        by_options.setdefault(prompts[index][1], []).append(index)
    groups = []
    for options, members in by_options.items():
        while members:
            count = max(1, batch_tokens // (len(prompts[members[0]][0]) + options.length))
            groups.append((options, members[:count]))
            members = members[count:]
    return groups


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _rounded(count: int) -> int:
    return 1 << (count - 1).bit_length()
