"""What models read and write: conversations, prompts with answers, chat templates, and their tokens."""

from jcrosslora.text.completion import Completion, Message, Prompt
from jcrosslora.text.reading import Reading, read

__all__ = ["Completion", "Message", "Prompt", "Reading", "read"]
