"""MLX, mlx-lm 0.32 (2026): mlx_lm/tuner/utils.py."""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.module_names import same_mlx_names
from jcrosslora.adapter.engines.rules import Engine, note_mixers

# Family -> what stands in the names of modules that its class in mlx_lm lacks: it takes matrices of latent attention
# apart, or calls modules by names of its own.
_LACKS = {
    **dict.fromkeys(("deepseek_v3", "mistral4"), ".kv_b_proj."),
    **{"lfm2_moe": ".feed_forward.w", "nemotron_h": ".mixer."},
}


def parameters(facts: AdapterFacts) -> str | None:
    stated = facts.config.get("lora_parameters")
    keys = stated if isinstance(stated, dict) else {}
    missing = [key for key in ("rank", "scale") if key not in keys]
    wrong = missing and not _whole_model(facts)
    return f"lora_parameters of the configuration lacks {' and '.join(missing)}" if wrong else None


def names(facts: AdapterFacts) -> str | None:
    other = [key for key in facts.shapes if not key.endswith((".lora_a", ".lora_b", ".m"))]
    return f"tensor {other[0]!r} is not a lora_a or lora_b" if other and not _whole_model(facts) else None


def one_rank(facts: AdapterFacts) -> str | None:
    if parameters(facts) or _whole_model(facts):
        return None
    rank, sides = facts.config["lora_parameters"]["rank"], {".lora_a": -1, ".lora_b": 0}
    other = [
        key
        for key, shape in facts.shapes.items()
        for suffix, axis in sides.items()
        if key.endswith(suffix) and len(shape) == 2 and shape[axis] != rank
    ]
    return f"tensor {other[0]!r} is not of rank {str(rank)[:20]}, which the configuration states" if other else None


def lacking(facts: AdapterFacts) -> str | None:
    part = _LACKS.get(facts.family or "")
    keys = [key for key in facts.shapes if part is not None and part in key]
    return f"its class has no module of the name of {keys[0]!r}, and it refuses the adapter" if keys else None


def _whole_model(facts: AdapterFacts) -> bool:
    return facts.config.get("fine_tune_type") == "full"


MLX = Engine("MLX", (parameters, names, one_rank, lacking, same_mlx_names), (note_mixers,), form="MLX")
