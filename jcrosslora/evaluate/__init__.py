"""Evaluation with intervals: multiple choice, written answers; and the effect of a moved adapter."""

from jcrosslora.evaluate.answers import ANSWER_FIGURES as ANSWER_FIGURES
from jcrosslora.evaluate.answers import Answers as Answers
from jcrosslora.evaluate.answers import answer as answer
from jcrosslora.evaluate.bootstrap import Direction as Direction
from jcrosslora.evaluate.bootstrap import Interval as Interval
from jcrosslora.evaluate.bootstrap import bootstrap_means as bootstrap_means
from jcrosslora.evaluate.bootstrap import intervals as intervals
from jcrosslora.evaluate.bootstrap import lift_recovered as lift_recovered
from jcrosslora.evaluate.bootstrap import word_of as word_of
from jcrosslora.evaluate.effect import Change as Change
from jcrosslora.evaluate.effect import Effect as Effect
from jcrosslora.evaluate.effect import check_effect as check_effect
from jcrosslora.evaluate.examples import Example as Example
from jcrosslora.evaluate.examples import Question as Question
from jcrosslora.evaluate.examples import read_examples as read_examples
from jcrosslora.evaluate.examples import read_task as read_task
from jcrosslora.evaluate.output import answers_json as answers_json
from jcrosslora.evaluate.output import answers_page as answers_page
from jcrosslora.evaluate.output import print_answers as print_answers
from jcrosslora.evaluate.output import print_scores as print_scores
from jcrosslora.evaluate.output import scores_json as scores_json
from jcrosslora.evaluate.score import FIGURES as FIGURES
from jcrosslora.evaluate.score import Scores as Scores
from jcrosslora.evaluate.score import read_questions as read_questions
from jcrosslora.evaluate.score import score as score
