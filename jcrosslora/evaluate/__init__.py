"""Evaluation: questions with choices, scored by likelihood, with intervals; and the effect of a moved adapter."""

from jcrosslora.evaluate.bootstrap import Interval, bootstrap_means, lift_recovered
from jcrosslora.evaluate.score import read_questions, score
from jcrosslora.evaluate.scores import FIGURES, Scores, print_scores
from jcrosslora.evaluate.tasks import Question, read_task

__all__ = [
    "FIGURES",
    "Interval",
    "Question",
    "Scores",
    "bootstrap_means",
    "lift_recovered",
    "print_scores",
    "read_questions",
    "read_task",
    "score",
]
