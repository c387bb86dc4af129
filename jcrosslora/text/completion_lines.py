"""Completions as JSON lines, for the file `completions.jsonl` beside an adapter that was fitted to them."""

import json
from collections.abc import Iterable
from typing import Any

from jcrosslora.text.completion import Completion, message_entries

COMPLETIONS = "completions.jsonl"


def completion_lines(completions: Iterable[Completion]) -> str:
    """Write one JSON object a line: {"messages"} with the answer as the last one, or {"prompt", "completion"}.

    The completion follows its prompt as it is, without a space between them. A line has "ended": false if the answer
    was cut off.
    """
    return "".join(f"{json.dumps(_entry(one), ensure_ascii=False)}\n" for one in completions)


def _entry(completion: Completion) -> dict[str, Any]:
    cut_off = {} if completion.ended else {"ended": False}
    if isinstance(completion.prompt, str):
        return {"prompt": completion.prompt, "completion": completion.answer, **cut_off}
    return {
        "messages": [*message_entries(completion.prompt), {"role": "assistant", "content": completion.answer}],
        **cut_off,
    }
