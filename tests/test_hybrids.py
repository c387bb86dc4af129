"""Families with mixers beside attention, in the places beside the decoder that go through modules and caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_models import random_model
from expert_models import EXPERT_VARIANTS
from full_set import full_except
from hybrid_models import GEMMA4, HYBRIDS
from probe_bases import CORPUS, QUESTIONS, save_tokenizer, write_base
from safetensors.numpy import load_file
from test_evaluate_oracle import plain_scores
from tiny_bases import random_adapter
from tiny_models import torch, transformers

import jcrosslora as jcl
from jcrosslora.architectures import EMBEDDING
from jcrosslora.checkpoint import FAMILIES, check_config
from jcrosslora.decoder import Sampling, extend, forward, load_model, logits, prefill, stack_adapter
from jcrosslora.distill import DistillSettings
from jcrosslora.distill.run import distill
from jcrosslora.errors import CheckpointError
from jcrosslora.evaluate import score
from jcrosslora.training import TrainingSettings, first_factors

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
NAMES = ("lfm2", "qwen3_5", "granite-bias", "falcon_h1", "gemma4", "nemotron_h", "olmo_hybrid-nope")
LENGTHS, WIDTH, WRITTEN = (9, 14, 3), 14, 5
ROWS = [np.random.default_rng(length).integers(3, 64, length).astype(np.int32) for length in LENGTHS]


@pytest.fixture(scope="module", params=full_except(NAMES, ["qwen3_5"]))
def case(request):
    """A model in torch and what is read from it, with an adapter."""
    model = random_model(*HYBRIDS[request.param])
    base = jcl.open_base(model)
    adapter = random_adapter(base, rank=2, scale=0.05)
    return model, base, load_model(base), stack_adapter(adapter, base)


def padded(left):
    """Tokens and mask, with other tokens than 0 in the padding."""
    tokens, mask = np.full((len(ROWS), WIDTH), 7, np.int32), np.zeros((len(ROWS), WIDTH), bool)
    for row, text in enumerate(ROWS):
        place = slice(WIDTH - len(text), None) if left else slice(len(text))
        tokens[row, place], mask[row, place] = text, True
    return tokens, mask


@jax.jit
def run(ours, adapter, tokens, mask=None):
    return logits(ours, forward(ours.with_adapter(adapter), tokens, mask=mask).hidden)


@pytest.mark.parametrize("left", full_except([True, False], [True]))
def test_padding_changes_nothing(case, left):
    model, _, ours, _ = case
    tokens, mask = padded(left)
    found = np.asarray(run(ours, None, tokens, mask))
    for row, text in enumerate(ROWS):
        with torch.no_grad():
            wanted = model(input_ids=torch.from_numpy(text).long()[None]).logits[0].numpy()
        np.testing.assert_allclose(found[row][mask[row]], wanted, **CLOSE)


@pytest.mark.parametrize("left", full_except([True, False], [True]))
def test_what_is_written_is_what_the_whole_pass_says(case, left):
    _, _, ours, adapter = case
    tokens, mask = padded(left)
    state = prefill(ours.with_adapter(adapter), tokens, mask, room=WRITTEN)
    _, written, _ = extend(
        ours.with_adapter(adapter), state, Sampling(jnp.float32(0), jax.random.key(0)), count=WRITTEN
    )
    whole = np.zeros((len(ROWS), WIDTH + WRITTEN), np.int32)
    for row, (text, new) in enumerate(zip(ROWS, np.asarray(written), strict=True)):
        whole[row, : len(text) + WRITTEN] = np.concatenate([text, new])
    scores = np.asarray(run(ours, adapter, whole))
    for row, text in enumerate(ROWS):
        likeliest = scores[row, len(text) - 1 : len(text) + WRITTEN - 1].argmax(-1)
        np.testing.assert_array_equal(likeliest, np.asarray(written)[row])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return jcl.open_base(write_base(tmp_path_factory.mktemp("llama"), 30, bos=True, layers=2))


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    """A function that returns the base of a family, with a tokenizer."""
    made = {}

    def base(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            family, settings = HYBRIDS[name]
            vocab = save_tokenizer(folder, 60, bos=False)
            vocabs = {"vocab_size", "vocab_size_per_layer_input"} & {"vocab_size", *settings}
            random_model(family, settings | dict.fromkeys(vocabs, vocab)).save_pretrained(folder)
            made[name] = jcl.open_base(folder)
        return made[name]

    return base


@pytest.mark.parametrize("name", full_except(["lfm2-bias", "gemma4"], ["lfm2-bias"]))
def test_choices_behind_one_prefix_are_scored_as_whole_texts(hybrids, name):
    """The cache of a question serves all its choices, with the states of mixers."""
    base = hybrids(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(base.path)
    found = score(base, QUESTIONS)
    for place, question in enumerate(QUESTIONS):
        wanted = [log_prob for log_prob, _ in plain_scores(model, tokenizer, question)]
        np.testing.assert_allclose(found.log_probs[0, place, : len(wanted)], wanted, atol=1e-4)


SMALL = DistillSettings(
    fit_rank=2, passes=4, rate=3e-2, completions=24, answer_tokens=3, discovery=0, contrast_weight=1.0
)


@pytest.mark.slow
def test_a_hybrid_learns_from_a_dense_source(llama, hybrids):
    target = hybrids("qwen3_5-bias")
    found = distill(llama, target, random_adapter(llama, scale=0.3), prompts=CORPUS, settings=SMALL)
    assert found.curve[-1].divergence < 0.98 * found.curve[0].divergence
    assert set(found.adapter.modules) == set(target.modules)


@pytest.mark.slow
def test_a_dense_target_learns_from_a_hybrid_source(llama, hybrids):
    source, settings = hybrids("qwen3_5-bias"), dataclasses.replace(SMALL, rate=5e-3, passes=2, completions=48)
    found = distill(source, llama, random_adapter(source, scale=0.3), prompts=CORPUS, settings=settings)
    assert found.curve[-1].divergence < found.curve[0].divergence


@pytest.mark.parametrize(
    "name", full_except(["lfm2-bias", "qwen3_5-bias", "gemma4", "nemotron_h-latent"], ["lfm2-bias"])
)
def test_what_has_no_counterpart_is_listed(llama, hybrids, name):
    base = hybrids(name)
    adapter = random_adapter(base, rank=2, scale=0.1)
    result = jcl.transfer(adapter, base, llama, "pad-truncate", cache=False, effect="never")
    mixers = [item for item, module in base.modules.items() if module.role not in llama.architecture.role_shapes]
    assert mixers
    assert {item.source for item in result.report.unmapped_sources} >= set(mixers)
    back = jcl.transfer(result.adapter, llama, base, "pad-truncate", cache=False, effect="never")
    assert set(back.report.unmapped_targets) >= set(mixers)
    own = jcl.transfer(adapter, base, base, "pad-truncate", cache=False, effect="never")
    assert set(own.adapter.modules) == set(base.modules)


def test_training_starts_with_all_modules_of_a_hybrid(hybrids):
    base = hybrids("qwen3_5-bias")
    assert set(first_factors(base, TrainingSettings(rank=2)).roles) == set(base.architecture.role_shapes)


def test_a_factor_on_what_a_module_reads_or_returns_is_part_of_its_gain():
    family, settings = HYBRIDS["falcon_h1"]
    base = jcl.open_base(random_model(family, settings))
    params = load_model(base).params
    gain = base.residual_gain("model.layers.1.mamba.in_proj")
    np.testing.assert_allclose(gain, 1.3 * np.asarray(params.norms["attn"][1]), rtol=1e-6)
    np.testing.assert_allclose(base.residual_gain("model.layers.1.mlp.down_proj"), np.full(32, 1.4), rtol=1e-6)


def test_norms_of_one_side_are_the_gain_of_the_modules_on_that_side():
    base = jcl.open_base(random_model(*HYBRIDS["olmo_hybrid-nope"]))
    attention, linear = "model.layers.0", "model.layers.1"

    def gain(module):
        return base.residual_gain(module)

    for module in (f"{attention}.self_attn.q_proj", f"{attention}.mlp.up_proj", f"{linear}.linear_attn.out_proj"):
        np.testing.assert_array_equal(gain(module), np.ones(32))
    np.testing.assert_array_equal(gain(f"{linear}.mlp.down_proj"), np.ones(32))
    for module, norm in (
        (f"{attention}.self_attn.o_proj", f"{attention}.post_attention_layernorm"),
        (f"{attention}.mlp.down_proj", f"{attention}.post_feedforward_layernorm"),
        (f"{linear}.linear_attn.q_proj", f"{linear}.input_layernorm"),
        (f"{linear}.mlp.up_proj", f"{linear}.post_attention_layernorm"),
    ):
        np.testing.assert_array_equal(gain(module), base.tensor(f"{norm}.weight"))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("lfm2", {"layer_types": ["conv", "sliding_attention"]}, "layer type 'sliding_attention' is not supported"),
        ("nemotron_h", {"layers_block_type": ["mamba", "conv"]}, "layer type 'conv' is not supported"),
        ("nemotron_h", {"hybrid_override_pattern": "M-X"}, "hybrid_override_pattern 'M-X', expected a list of kinds"),
        ("nemotron_h", {"hybrid_override_pattern": "M" * 20000}, "with one for each layer"),
        ("nemotron_h", {"hybrid_override_pattern": "M-", "n_groups": 5}, "128 is not a multiple of n_groups 5"),
        (
            "nemotron_h",
            {"hybrid_override_pattern": "M-", "time_step_limit": 0},
            "'time_step_limit' is '0', expected a list of 2 numbers",
        ),
        ("nemotron_h", {"hybrid_override_pattern": "M-", "sliding_window": 8}, "'sliding_window'=8 is not known"),
        ("lfm2", {"full_attn_idxs": 1}, "'full_attn_idxs' is 1, expected a list of layers"),
        ("granitemoehybrid", {"num_local_experts": 0, "num_hidden_layers": 1 << 30}, "expected at most 16384"),
        ("lfm2", {"conv_L_cache": 0}, "'conv_L_cache' is 0, expected a positive integer"),
        ("lfm2", {"use_pos_enc": False}, "'use_pos_enc'=False is not supported"),
        ("qwen3_5_text", {"linear_num_value_heads": 3, "linear_num_key_heads": 2}, "3 is not a multiple of"),
        ("olmo_hybrid", {"layer_types": ["conv", "full_attention"]}, "layer type 'conv' is not supported"),
        ("olmo_hybrid", {"linear_num_value_heads": 6}, "6 is not a multiple of linear_num_key_heads 4"),
        ("olmo_hybrid", {"linear_allow_neg_eigval": 1}, "'linear_allow_neg_eigval' is 1, expected true or false"),
        ("olmo_hybrid", {"linear_norm_eps": 1e-6}, "'linear_norm_eps'=1e-06 is not known for olmo_hybrid"),
        ("qwen3_5_text", {"attn_output_gate": False}, "'attn_output_gate'=False is not supported"),
        ("granitemoehybrid", {"num_local_experts": None}, "'num_local_experts' is 'None', expected the number"),
        ("lfm2_moe", {}, "'layer_types' is missing"),
        ("lfm2_moe", {"use_expert_bias": False}, "'use_expert_bias'=False is not supported"),
        ("phimoe", {"num_experts_per_tok": 3}, "'num_experts_per_tok'=3 is not supported for phimoe: expected 2"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "'n_group' is None, expected a positive integer"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "'topk_method'='noaux_tc' is not supported for deepseek_v2"),
        (
            "mistral4",
            {"rope_parameters": {"partial_rotary_factor": 0.4}},
            "partial_rotary_factor '0.4' of 128 features is not qk_rope_head_dim 64",
        ),
        ("granitemoehybrid", {"num_local_experts": 0, "mamba_n_heads": 5}, "mamba_n_heads 5 times mamba_d_head"),
        (
            "gemma4_text",
            GEMMA4 | {"num_kv_shared_layers": 4},
            "'num_kv_shared_layers' is 4, expected fewer than 6 layers",
        ),
        ("gemma4_text", GEMMA4 | {"vocab_size_per_layer_input": 60}, "is 60, expected that of vocab_size"),
        ("gemma4_text", GEMMA4 | {"per_layer_config": {"2": {"head_dim": 8}}}, "expected the same head_dim and"),
        (
            "gemma4_text",
            GEMMA4 | {"per_layer_config": {"02": {"head_dim": 8}, "5": {"head_dim": 12}}},
            "expected the same head_dim and",
        ),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "'use_bidirectional_attention'='all' is not supported"),
        (
            "gemma4_text",
            GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 3},
            "4 is not a multiple of num_global_key_value_heads 3",
        ),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "'ssm_multipliers' is '\\[1.0\\]', expected a list of 5 numbers"),
    ],
)
def test_settings_of_mixers_that_cannot_be_read_are_named(family, change, message):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    with pytest.raises(CheckpointError, match=f"^here: .*{message}"):
        check_config({"model_type": family, "vocab_size": 64} | sizes | change, "here")


@pytest.mark.parametrize("name", [*HYBRIDS, "deepseek_v2", "mistral4"])
def test_a_resolved_configuration_resolves_to_itself(name):
    family, settings = (HYBRIDS | EXPERT_VARIANTS)[name]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    once = FAMILIES[family].resolve(FAMILIES[family].defaults | sizes | {"vocab_size": 64} | settings)
    assert FAMILIES[family].resolve(once) == once


def test_names_of_the_embedding_and_of_files_are_those_of_the_class(tmp_path):
    """Nemotron-H calls its embedding otherwise, and has another prefix in files than in memory."""
    model = random_model(*HYBRIDS["nemotron_h"])
    model.save_pretrained(tmp_path / "base")
    base, live = jcl.open_base(tmp_path / "base"), jcl.open_base(model)
    assert {*base.modules} == {*live.modules}
    np.testing.assert_array_equal(base.tensor(EMBEDDING), model.model.embeddings.weight.detach().numpy())
    adapter = random_adapter(base, rank=2, scale=0.1)
    out = jcl.save_adapter(adapter, tmp_path / "adapter", base=base)
    jcl.merge(jcl.MergeSettings(str(tmp_path / "base"), str(out), str(tmp_path / "merged")))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tokens = ROWS[0][None]
    with torch.no_grad():
        found = merged(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    wanted = run(load_model(base), stack_adapter(adapter, base), tokens)
    np.testing.assert_allclose(found, wanted, **CLOSE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_tensor_in_parts_is_merged_into_them(tmp_path):
    """Files of OLMo Hybrid hold its convolution in three, and norms under other names."""
    peft = pytest.importorskip("peft")
    model = random_model(*HYBRIDS["olmo_hybrid-nope"])
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["g_proj"], modules_to_save=["conv1d", "input_layernorm"])
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".default." in name:
                parameter.normal_(0.5, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    base = jcl.open_base(tmp_path / "base")
    jcl.merge(jcl.MergeSettings(str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "merged")))
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged")]
    assert set(files[0]) == set(files[1])
    assert "model.layers.1.linear_attn.k_conv1d.weight" in files[0]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tokens = torch.from_numpy(ROWS[0]).long()[None]
    with torch.no_grad():
        np.testing.assert_allclose(merged(tokens).logits, adapted(tokens).logits, **CLOSE)
    again = jcl.open_base({name: array for name, array in files[0].items()}, config=base.config)
    name = "model.layers.1.linear_attn.conv1d.weight"
    np.testing.assert_array_equal(again.tensor(name), base.tensor(name))
    ids = np.array([5, 80, 0])
    np.testing.assert_array_equal(base.rows(name, ids), base.tensor(name).reshape(-1, 3)[ids])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_changes_of_an_embedding_with_a_name_of_its_own_are_listed(tmp_path):
    peft = pytest.importorskip("peft")
    model = random_model(*HYBRIDS["nemotron_h"])
    base = jcl.open_base(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embeddings"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    adapter = jcl.load_adapter(tmp_path, base)
    assert not adapter.tokens
    assert set(adapter.modules) == {"model.layers.4.mixer.q_proj"}
    assert "model.embeddings is the embedding of nemotron_h" in adapter.info.ignored[0]
