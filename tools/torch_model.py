"""A base model as a Hugging Face torch model, for tools and tests (needs the test extra)."""

import numpy as np
import torch
import transformers

from jcrosslora.checkpoint import BaseModel


def torch_model(base: BaseModel, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The causal language model of transformers with the weights that our reader gives, in eval mode.

    Args:
        base: an open base of any supported family, GGUF included.
        dtype: of all parameters.

    Raises:
        RuntimeError: a parameter of the model has no tensor in the base.
    """
    settings = {key: value for key, value in base.config.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(base.config["model_type"], **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = {name: _tensor(base.tensor(name), dtype) for name in base.store.names()}
    result = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(result.missing_keys) - tied or result.unexpected_keys:
        raise RuntimeError(f"weights do not fit: missing {result.missing_keys}, unexpected {result.unexpected_keys}")
    model.tie_weights()
    return model.eval()


def _tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32)).to(dtype)
