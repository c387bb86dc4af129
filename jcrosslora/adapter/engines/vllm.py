"""vLLM, main branch in September 2026: vllm/lora/peft_helper.py, lora_model.py and the choices of --max-lora-rank.

Releases with a `bias_enabled` in peft_helper.py read no rank_pattern and no alpha_pattern.
"""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.module_names import same_names
from jcrosslora.adapter.engines.rules import (
    Engine,
    note_mixers,
    note_pickle,
    only_plain_lora,
    only_tensors,
    overriding_modules,
)
from jcrosslora.checkpoint.wrapped import TEXT

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16  # of --max-lora-rank


def required_keys(facts: AdapterFacts) -> str | None:
    missing = [key for key in ("r", "lora_alpha", "target_modules") if facts.config.get(key) in (None, "")]
    return f"the configuration lacks {', '.join(missing)}" if missing else None


def no_bias(facts: AdapterFacts) -> str | None:
    bias = facts.config.get("bias") or "none"
    return None if bias == "none" else f"bias {bias!r} is not supported"


def saved_modules(facts: AdapterFacts) -> str | None:
    saved = facts.config.get("modules_to_save") or []
    other = [name for name in (saved if isinstance(saved, list) else [saved]) if name not in ("classifier", "score")]
    return f"modules_to_save {', '.join(map(str, other))} is not supported" if other else None


def largest_rank(facts: AdapterFacts) -> str | None:
    rank = _largest_rank(facts)
    return f"rank {rank} is above {RANKS[-1]}, the largest it takes" if rank > RANKS[-1] else None


def note_rank_flag(facts: AdapterFacts) -> str | None:
    rank = _largest_rank(facts)
    enough = next((size for size in RANKS if size >= rank), None)
    return f"rank {rank} needs --max-lora-rank {enough}" if enough and rank > _DEFAULT_RANK else None


def note_patterns(facts: AdapterFacts) -> str | None:
    note = "older releases read one scale for all modules and apply this one wrongly"
    return note if overriding_modules(facts) else None


def note_embedding(facts: AdapterFacts) -> str | None:
    has = any(tensor.kind == "embedding" for tensor in facts.tensors)
    return "the LoRA of the embedding must have the base's vocabulary size" if has else None


def _largest_rank(facts: AdapterFacts) -> int:
    ranks = [shape[0] for shape in facts.factors("A").values()]
    if facts.pickle and facts.peft_type == "LORA":
        ranks = [int(facts.config["r"]), *map(int, (facts.config.get("rank_pattern") or {}).values())]
    return max(ranks, default=0)


# peft stores a copy of an embedding or head that is trained with LoRA; vLLM skips it.
_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_TENSORS = only_tensors("A", "B", "embedding", skipped=lambda tensor: tensor.key.endswith(_COPIES))

VLLM = Engine(
    "vLLM",
    (
        *(only_plain_lora(), required_keys, no_bias, saved_modules, _TENSORS, largest_rank),
        same_names(f"language_model.{TEXT}"),  # its own names
    ),
    (note_pickle, note_rank_flag, note_patterns, note_embedding, note_mixers),
)
