"""Find out what job an adapter was trained for, without data, and write prompts that ask for it."""

from jcrosslora.distill.task_search.answers import Questioner as Questioner
from jcrosslora.distill.task_search.kinds import KINDS as KINDS
from jcrosslora.distill.task_search.request_writer import choose_writer as choose_writer
from jcrosslora.distill.task_search.request_writer import list_prompts as list_prompts
from jcrosslora.distill.task_search.request_writer import requests_cost as requests_cost
from jcrosslora.distill.task_search.request_writer import write_lines as write_lines
from jcrosslora.distill.task_search.search import NOTHING as NOTHING
from jcrosslora.distill.task_search.search import FoundTask as FoundTask
from jcrosslora.distill.task_search.search import find_task as find_task
from jcrosslora.distill.task_search.search import search_cost as search_cost
