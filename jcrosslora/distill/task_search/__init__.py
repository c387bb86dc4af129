"""Find out which task an adapter was trained on, without data, and write prompts of that task."""

from jcrosslora.distill.task_search.answers import AdapterProber as AdapterProber
from jcrosslora.distill.task_search.kinds import KINDS as KINDS
from jcrosslora.distill.task_search.request_writer import SIMILAR as SIMILAR
from jcrosslora.distill.task_search.request_writer import choose_writer as choose_writer
from jcrosslora.distill.task_search.request_writer import find_form as find_form
from jcrosslora.distill.task_search.search import NOTHING as NOTHING
from jcrosslora.distill.task_search.search import DiscoveredTask as DiscoveredTask
from jcrosslora.distill.task_search.search import find_task as find_task
from jcrosslora.distill.task_search.search import search_cost as search_cost
