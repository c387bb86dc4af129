"""What models read and write: conversations, prompts with answers, chat templates, and their tokens."""

from jcrosslora.text.completion import COMPLETIONS, Completion, Message, Prompt, completion_lines, prompt_text
from jcrosslora.text.reading import Reading, prompt_ids, read, render

__all__ = [
    "COMPLETIONS",
    "Completion",
    "Message",
    "Prompt",
    "Reading",
    "completion_lines",
    "prompt_ids",
    "prompt_text",
    "read",
    "render",
]
