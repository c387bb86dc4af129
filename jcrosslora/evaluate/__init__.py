"""How well models answer questions with choices: log-likelihood scores, intervals, and the lift that a move keeps."""

from jcrosslora.evaluate.bootstrap import Interval, bootstrap_means, lift_recovered
from jcrosslora.evaluate.score import read_questions, score
from jcrosslora.evaluate.scores import FIGURES, Scores
from jcrosslora.evaluate.table import print_scores
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
