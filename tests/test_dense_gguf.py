"""Dense families beyond the first seven in GGUF files: names of the gguf package, numbers of the model in torch."""

from dataclasses import asdict, dataclass, field

import numpy as np
import pytest
from dense_models import FOUR, MINISTRAL, random_model
from gguf_files import gguf, permute, write_gguf
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.checkpoint.gguf_names import architecture
from jcrosslora.decoder import settings_of
from jcrosslora.errors import CheckpointError

NAMES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
SLIDING = [True, True, True, False]
ACTIVATION = ("alpha_p", "alpha_n", "beta", "eps")


@dataclass(frozen=True)
class Form:
    """A model in torch, and what llama.cpp's converter makes of it beside the tensors' names.

    Attributes:
        family: its model_type.
        arch: `general.architecture`.
        settings: of the model.
        metadata: beside what all files have.
        permuted: whether rows of q and k are reordered.
        offset: what is added to the weights of norms.
    """

    family: str
    arch: str
    settings: dict
    metadata: dict = field(default_factory=dict)
    permuted: bool = False
    offset: float = 0.0


FORMS = {
    "smollm3": Form("smollm3", "smollm3", {"num_hidden_layers": 4}, permuted=True),
    "ministral3": Form(
        "ministral3",
        "mistral3",
        {"head_dim": 12, "rope_parameters": MINISTRAL},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 8,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.5,
        },
        permuted=True,
    ),
    "olmo2": Form("olmo2", "olmo2", {}),
    "olmo3": Form("olmo3", "olmo2", FOUR, {"attention.sliding_window": 6, "attention.sliding_window_pattern": SLIDING}),
    "granite": Form(
        "granite",
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 5.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
        {"embedding_scale": 3.0, "attention.scale": 0.2, "residual_scale": 0.3, "logit_scale": 5.0},
        permuted=True,
    ),
    "glm4": Form("glm4", "glm4", {"head_dim": 12}, {"rope.dimension_count": 6}),
    "cohere": Form("cohere", "command-r", {"logit_scale": 0.3}, {"logit_scale": 0.3, "rope.scaling.type": "none"}),
    "cohere2": Form(
        "cohere2",
        "cohere2",
        FOUR | {"logit_scale": 0.3},
        {"logit_scale": 0.3, "attention.sliding_window": 6, "rope.scaling.type": "none"},
    ),
    "exaone4": Form(
        "exaone4", "exaone4", FOUR, {"attention.sliding_window": 6, "attention.sliding_window_pattern": SLIDING}
    ),
    "exaone4-full": Form("exaone4", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "seed_oss": Form("seed_oss", "seed_oss", {"head_dim": 12}),
    "hunyuan": Form(
        "hunyuan_v1_dense",
        "hunyuan-dense",
        {
            "head_dim": 12,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
        },
        {"rope.freq_base": 100.0 * 50.0**1.2, "rope.scaling.type": "none"},
    ),
    "gemma": Form("gemma", "gemma", {"head_dim": 12}, offset=1.0),
    "starcoder2": Form("starcoder2", "starcoder2", {}),
    "phi": Form("phi", "phi2", {"partial_rotary_factor": 0.5}, {"rope.dimension_count": 4}),
    "apertus": Form("apertus", "apertus", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "arcee": Form("arcee", "arcee", {"head_dim": 12, "mlp_bias": True}, permuted=True),
    "ernie4_5": Form("ernie4_5", "ernie4_5", {"head_dim": 12}),
    "mixtral": Form(
        "mixtral",
        "llama",
        {"head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 2},
        {"expert_count": 5, "expert_used_count": 2},
        permuted=True,
    ),
    "qwen3_moe": Form(
        "qwen3_moe",
        "qwen3moe",
        {
            "head_dim": 12,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
        },
        {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 12},
    ),
    "nemotron": Form("nemotron", "nemotron", {}, {"rope.dimension_count": 4}, offset=1.0),
}


def stored_tensors(model, form: Form) -> dict:
    """Name and change the tensors as llama.cpp's converter does."""
    names = gguf.get_tensor_name_map(NAMES[form.arch], model.config.num_hidden_layers)
    counts = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    stored = {}
    for name, tensor in model.state_dict().items():
        array, module = tensor.numpy(), name.split(".")[-2]
        if module == "act_fn" or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        if form.permuted and module in counts:
            array = permute(array, counts[module])
        if form.offset and name.endswith("norm.weight"):
            array = array + np.float32(form.offset)
        if name.endswith("experts.gate_up_proj"):
            for part, each in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                stored[f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight"] = each, None
        elif name.endswith("experts.down_proj"):
            stored[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = array, None
        else:
            stored[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array, None
    return stored


def metadata_of(model, form: Form) -> dict:
    config, state = model.config, model.state_dict()
    norm, eps = next(
        (("layer_norm_rms_epsilon" if key.startswith("rms") else "layer_norm_epsilon"), getattr(config, key))
        for key in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")
        if hasattr(config, key)
    )
    rope = config.rope_parameters
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        f"attention.{norm}": eps,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        values["attention.key_length"] = config.head_dim
    for name in ACTIVATION if form.family == "apertus" else ():
        numbers = (state[f"model.layers.{layer}.mlp.act_fn.{name}"] for layer in range(config.num_hidden_layers))
        values[f"xielu.{name}"] = [number.item() for number in numbers]
    return values | form.metadata


@pytest.fixture(scope="module", params=list(FORMS))
def written(request, tmp_path_factory):
    form = FORMS[request.param]
    model = random_model(form.family, form.settings)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, form.arch, metadata_of(model, form), stored_tensors(model, form))
    return form, model, jcl.open_base(path)


def test_a_gguf_file_holds_the_tensors_and_settings_of_the_model(written):
    form, model, base = written
    assert base.family.name == form.family
    live = jcl.open_base(model)
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            np.testing.assert_allclose(base.tensor(name), tensor.numpy(), rtol=0, atol=1e-6 if form.offset else 0)
    for layer in base.layers_with("experts"):
        for matrix in ("gate_up", "down"):
            np.testing.assert_array_equal(base.expert_tensor(layer, matrix), live.expert_tensor(layer, matrix))
    found, wanted = (asdict(settings_of(one)) for one in (base, live))
    ropes = [[tuple(rope.values()) for rope in settings.pop("ropes")] for settings in (found, wanted)]
    for (ours, *rest), (theirs, *others) in zip(*ropes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # the base of the frequencies is stored as float32
        assert rest == others
    assert found == wanted


def test_a_gguf_adapter_is_read_as_it_was_written(written, tmp_path):
    form, _, base = written
    assert architecture(form.family) == form.arch
    held = {part for parts in base.fused.values() if len(parts) > 1 for part, _, _ in parts}
    adapter = random_adapter(base, rank=2, roles=[role for role in base.family.roles if role not in str(held)])
    out = jcl.save_adapter(adapter, tmp_path / "out", base=base, profile="gguf")
    again = jcl.load_adapter(out / "adapter.gguf", base)
    holders = {parts[0][0]: whole for whole, parts in base.fused.items()}
    assert set(again.modules) == {holders.get(name, name) for name in adapter.modules}
    for name, factors in adapter.modules.items():
        read = again.modules[holders.get(name, name)]
        np.testing.assert_allclose(read.scale * read.b @ read.a, factors.b @ factors.a, atol=1e-5)


def test_lists_of_another_length_are_refused(tmp_path):
    form = FORMS["apertus"]
    model = random_model(form.family, form.settings)
    metadata = metadata_of(model, form) | {"xielu.alpha_p": [0.5]}
    path = write_gguf(tmp_path / "model.gguf", form.arch, metadata, stored_tensors(model, form))
    with pytest.raises(CheckpointError, match=r"xielu.alpha_p is \[0.5\], wanted a number for each of 2 layers"):
        jcl.open_base(path)


def test_ministral_without_its_scale_is_refused(tmp_path):
    form = FORMS["ministral3"]
    model = random_model(form.family, form.settings)
    metadata = {key: value for key, value in metadata_of(model, form).items() if "temperature" not in key}
    path = write_gguf(tmp_path / "model.gguf", form.arch, metadata, stored_tensors(model, form))
    with pytest.raises(CheckpointError, match="temperature_scale is missing"):
        jcl.open_base(path)
