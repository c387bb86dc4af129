"""Evaluation with intervals: questions with choices, answers in writing; and the effect of a moved adapter."""

from jcrosslora.evaluate.answers import ANSWER_FIGURES, Answers, answer
from jcrosslora.evaluate.bootstrap import Interval, bootstrap_means, intervals, lift_recovered
from jcrosslora.evaluate.effect import Change, Effect, check_effect
from jcrosslora.evaluate.examples import Example, Question, read_examples, read_task
from jcrosslora.evaluate.output import answers_json, answers_page, print_answers, print_scores, scores_json
from jcrosslora.evaluate.score import FIGURES, Scores, read_questions, score

__all__ = [
    "ANSWER_FIGURES",
    "FIGURES",
    "Answers",
    "Change",
    "Effect",
    "Example",
    "Interval",
    "Question",
    "Scores",
    "answer",
    "answers_json",
    "answers_page",
    "bootstrap_means",
    "check_effect",
    "intervals",
    "lift_recovered",
    "print_answers",
    "print_scores",
    "read_examples",
    "read_questions",
    "read_task",
    "score",
    "scores_json",
]
