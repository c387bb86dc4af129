"""Prompt templates, and completions in them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptTemplate:
    """The text in front of a question or an instruction, and between it and its answer."""

    before: str
    after: str

    @property
    def name(self) -> str:
        """The word that it begins with, for reports."""
        return self.before.strip()

    def wrap(self, text: str) -> str:
        """Make a prompt of a question or an instruction."""
        return self.before + text + self.after

    def unwrap(self, prompt: str) -> str:
        """Return the question or the instruction of a prompt."""
        return prompt.removeprefix(self.before).removesuffix(self.after)


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


@dataclass(frozen=True)
class Completion:
    """A prompt with the answer that follows it.

    Attributes:
        prompt: all text in front of the answer.
        answer: the text behind it.
        template: of the prompt; None for a prompt of the user's.
    """

    prompt: str
    answer: str = ""
    template: PromptTemplate | None = None

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return self.prompt + self.answer


def in_template(completion: Completion, template: PromptTemplate) -> Completion:
    """Put a completion into another template; answers begin on a line of their own or behind a space."""
    assert completion.template is not None
    space = "" if template.after.endswith("\n") else " "
    prompt = template.wrap(completion.template.unwrap(completion.prompt))
    return Completion(prompt, space + completion.answer.lstrip(), template)
