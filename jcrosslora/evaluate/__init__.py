"""Evaluation with intervals: multiple choice, written answers; and the effect of a moved adapter."""

from jcrosslora.evaluate.answers import ANSWER_FIGURES, Answers, answer
from jcrosslora.evaluate.bootstrap import Direction, Interval, bootstrap_means, intervals, lift_recovered, word_of
from jcrosslora.evaluate.effect import Change, Effect, check_effect
from jcrosslora.evaluate.examples import Example, Question, as_completion, read_examples, read_prompts, read_task
from jcrosslora.evaluate.output import answers_json, answers_page, print_answers, print_scores, scores_json
from jcrosslora.evaluate.score import FIGURES, Scores, read_questions, score

__all__ = [
    "ANSWER_FIGURES",
    "FIGURES",
    "Answers",
    "Change",
    "Direction",
    "Effect",
    "Example",
    "Interval",
    "Question",
    "Scores",
    "answer",
    "answers_json",
    "answers_page",
    "as_completion",
    "bootstrap_means",
    "check_effect",
    "intervals",
    "lift_recovered",
    "print_answers",
    "print_scores",
    "read_examples",
    "read_prompts",
    "read_questions",
    "read_task",
    "score",
    "scores_json",
    "word_of",
]
