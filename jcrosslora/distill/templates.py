"""Prompt templates: what stands around a question or an instruction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.text import Completion, Message, Prompt
from jcrosslora.text.reading import render


@dataclass(frozen=True)
class PromptTemplate:
    """The text in front of a question or an instruction, and between it and its answer."""

    before: str
    after: str

    @property
    def name(self) -> str:
        """What reports call it: the word that it begins with."""
        return repr(self.before.strip())

    def wrap(self, text: str) -> Prompt:
        """Make a prompt of a question or an instruction."""
        return self.before + text + self.after

    def unwrap(self, prompt: Prompt) -> str:
        """Return the question or the instruction of a prompt of this template."""
        assert isinstance(prompt, str)
        return prompt.removeprefix(self.before).removesuffix(self.after)

    def answer(self, text: str) -> str:
        """Put an answer on a line of its own, or behind a space."""
        return ("" if self.after.endswith("\n") else " ") + text.lstrip()


@dataclass(frozen=True)
class ConversationTemplate(PromptTemplate):
    """A base's own chat template, with one message of the user."""

    @property
    def name(self) -> str:
        """What reports call it."""
        return "its chat template"

    def wrap(self, text: str) -> Prompt:
        """Make a message of a question or an instruction."""
        return (Message("user", text),)

    def unwrap(self, prompt: Prompt) -> str:
        """Return the question or the instruction of a message."""
        assert not isinstance(prompt, str)
        return prompt[-1].content

    def answer(self, text: str) -> str:
        """Drop the space in front of an answer, which chat templates do not want."""
        return text.lstrip()


TEMPLATES = (
    PromptTemplate("Question: ", "\nAnswer:"),
    PromptTemplate("Q: ", "\nA:"),
    PromptTemplate("User: ", "\nAssistant:"),
    PromptTemplate("### Instruction:\n", "\n\n### Response:\n"),
    PromptTemplate("Instruction: ", "\nResponse:"),
    PromptTemplate("Input: ", "\nOutput:"),
    PromptTemplate("Problem: ", "\nSolution:"),
    PromptTemplate("Task: ", "\nResult:"),
)


def templates_of(tokenizer: Tokenizer) -> tuple[PromptTemplate, ...]:
    """List the templates that an adapter of a base may have been trained on: the common ones, and the base's own."""
    if tokenizer.chat_template is None:
        return TEMPLATES
    rendered = render(tokenizer, (Message("user", "Question"),), ask=True)
    first, last = rendered.spans[0]
    before = rendered.text[:first]
    if tokenizer.bos is not None:  # which is put in front of plain text as well
        before = before.removeprefix(tokenizer.bos_name)
    return (*TEMPLATES, ConversationTemplate(before, rendered.text[last:]))


def in_template(completion: Completion, own: PromptTemplate, other: PromptTemplate) -> Completion:
    """Put a completion of one template into another."""
    prompt, answer = other.wrap(own.unwrap(completion.prompt)), other.answer(completion.answer)
    return dataclasses.replace(completion, prompt=prompt, answer=answer, origin=other.name)
