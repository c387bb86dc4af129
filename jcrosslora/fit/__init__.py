"""Fits of an update: to predictions (distill), to the residual stream, and to the difference of two bases' weights."""

from jcrosslora.fit.distill.settings import DistillSettings as DistillSettings
from jcrosslora.fit.distill.templates import TEMPLATES as TEMPLATES
from jcrosslora.fit.distill.templates import PromptTemplate as PromptTemplate
from jcrosslora.fit.distill.templates import templates_of as templates_of
