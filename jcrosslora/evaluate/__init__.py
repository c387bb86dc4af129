"""Evaluation with intervals: questions with choices, answers in writing; and the effect of a moved adapter."""

from jcrosslora.evaluate.answer import answer
from jcrosslora.evaluate.answers import ANSWER_FIGURES, Answers
from jcrosslora.evaluate.answers_page import answers_page
from jcrosslora.evaluate.answers_table import print_answers
from jcrosslora.evaluate.bootstrap import Interval, bootstrap_means, lift_recovered
from jcrosslora.evaluate.examples import Example, read_examples
from jcrosslora.evaluate.score import read_questions, score
from jcrosslora.evaluate.scores import FIGURES, Scores, print_scores
from jcrosslora.evaluate.tasks import Question, read_task

__all__ = [
    "ANSWER_FIGURES",
    "FIGURES",
    "Answers",
    "Example",
    "Interval",
    "Question",
    "Scores",
    "answer",
    "answers_page",
    "bootstrap_means",
    "lift_recovered",
    "print_answers",
    "print_scores",
    "read_examples",
    "read_questions",
    "read_task",
    "score",
]
