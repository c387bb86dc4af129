"""The texts of models: conversations, prompts with answers, chat templates, and their tokens."""

from jcrosslora.text.completion import COMPLETIONS as COMPLETIONS
from jcrosslora.text.completion import Completion as Completion
from jcrosslora.text.completion import Message as Message
from jcrosslora.text.completion import Prompt as Prompt
from jcrosslora.text.completion import completion_lines as completion_lines
from jcrosslora.text.completion import prompt_text as prompt_text
from jcrosslora.text.reading import Reading as Reading
from jcrosslora.text.reading import last_tokens as last_tokens
from jcrosslora.text.reading import prompt_ids as prompt_ids
from jcrosslora.text.reading import read as read
from jcrosslora.text.reading import render as render
