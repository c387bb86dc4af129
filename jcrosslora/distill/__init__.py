"""Fits of an update of the target: to predictions (`distill`), and to what an adapter does to the residual stream."""

from jcrosslora.distill.settings import DistillSettings as DistillSettings
from jcrosslora.distill.templates import TEMPLATES as TEMPLATES
from jcrosslora.distill.templates import PromptTemplate as PromptTemplate
from jcrosslora.distill.templates import templates_of as templates_of
