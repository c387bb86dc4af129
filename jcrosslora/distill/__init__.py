"""Fits of an update: to predictions (distill), to the residual stream, and to the difference of two bases' weights."""

from jcrosslora.distill.settings import DistillSettings as DistillSettings
from jcrosslora.distill.templates import TEMPLATES as TEMPLATES
from jcrosslora.distill.templates import PromptTemplate as PromptTemplate
from jcrosslora.distill.templates import templates_of as templates_of
