"""Training of a LoRA by transformers and peft on torch, to compare `jcrosslora.training.train_lora` with."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jcrosslora as jcl
from jcrosslora.architectures.blocks import ROLE_PATHS
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.evaluate.examples import Example
from jcrosslora.training import Plan, TrainingSettings, encode
from jcrosslora.training.batches import Batch
from jcrosslora.utils.progress import track


def train_by_peft(ref: str, examples: Sequence[Example], settings: TrainingSettings, out: Path) -> None:
    """Train a LoRA on all linear layers and write it as a PEFT folder.

    The tokens, the batches and their order, the learning rates, AdamW and the clip of the gradient are those of
    `train_lora`; the model, the first factors, the backward pass and the update are torch's.

    Args:
        ref: the base, a folder or a GGUF file that transformers reads.
        examples: to train on.
        settings: of the training; `modules` and `remat` are not used.
        out: the folder to write.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GgufConfig

    torch.manual_seed(settings.seed)
    path, base = Path(ref).expanduser(), jcl.open_base(ref)
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        place["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, settings.dtype))
    rank, alpha = settings.size
    names = [path.rpartition(".")[2] for role, path in ROLE_PATHS.items() if role in base.architecture.role_shapes]
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=int(alpha), target_modules=names, lora_dropout=0.0))
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=settings.weight_decay)
    tokenizer = load_tokenizer(base)
    plan = Plan([encode(tokenizer, one) for one in examples], settings.batch, settings.steps, settings.seed)
    with track(settings.steps, "train by peft", "steps") as bar:
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = _rate(settings, step)
            loss = _loss(model, plan.batch(step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            bar.note = f"loss {loss.item():.3f}"
            bar.update()
    model.save_pretrained(str(out))


def _rate(settings: TrainingSettings, step: int) -> float:
    """Compute the rate of a step: a linear rise, then half a cosine down to 0."""
    if step < settings.warm_up:
        return settings.rate * (step + 1) / (settings.warm_up + 1)
    done = (step - settings.warm_up) / (settings.steps - settings.warm_up)
    return settings.rate * (1 + math.cos(math.pi * done)) / 2


def _loss(model: Any, batch: Batch) -> Any:
    """Compute the mean of -log p(token) over the answer tokens of a batch; only these go through the head."""
    import torch

    tokens, mask, picked, wanted, used = (
        torch.from_numpy(np.array(one)) for one in (batch.tokens, batch.mask, batch.picked, batch.wanted, batch.used)
    )
    inner = model.get_base_model()
    hidden = inner.model(input_ids=tokens.long(), attention_mask=mask.long()).last_hidden_state
    scores = inner.lm_head(hidden.flatten(0, 1)[picked.long()[used > 0]]).float()
    return torch.nn.functional.cross_entropy(scores, wanted.long()[used > 0])
