"""Train an update of the target to match the predictions of the adapted source (`distill`)."""

from jcrosslora.distill.settings import DistillSettings as DistillSettings
from jcrosslora.distill.templates import TEMPLATES as TEMPLATES
from jcrosslora.distill.templates import PromptTemplate as PromptTemplate
from jcrosslora.distill.templates import templates_of as templates_of
