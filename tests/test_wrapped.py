"""Multimodal models: their text part is moved under the names of the class; transformers and peft are the oracles."""

import json
import shutil

import numpy as np
import pytest
from command_line import main
from decoder_pairs import TOLERANCE, random_tokens, run
from full_set import full_except
from safetensors.numpy import load_file, save_file
from tiny_bases import random_adapter
from tiny_models import save_tiny
from wrapped_models import CLASSES, TEXT, class_of, save_wrapped, tiny_wrapped, torch, transformers

import jcrosslora as jcl
from jcrosslora.adapter import check_engines, load_adapter, split_fused
from jcrosslora.checkpoint import check_config, class_module_name, read_dims, text_module_name
from jcrosslora.checkpoint.wrapped import TEXT_PREFIXES
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.errors import CheckpointError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = random_tokens(2, 20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that returns the folder of a class, made once."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save_wrapped(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def theirs(model) -> np.ndarray:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    # The outputs of this class in transformers 5.24 lack what it asks of its text model.
    model = inner.language_model if isinstance(inner, transformers.Llama4ForConditionalGeneration) else model
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()


def ours(base, adapter=None) -> np.ndarray:
    stacked = None if adapter is None else stack_adapter(adapter, base)
    return np.asarray(run(load_model(base), TOKENS, adapter=stacked))


def small_adapter(base, **changes):
    return random_adapter(base, **{"rank": 2, "scale": 0.05} | changes)


def renamed(folder, out, prefix):
    """Write an adapter under other names, as a text model or other versions of transformers have them."""
    shutil.copytree(folder, out)
    path = out / "adapter_model.safetensors"
    head = "base_model.model."
    tensors = {
        head + class_module_name(text_module_name(name.removeprefix(head)), prefix): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((out / "adapter_config.json").read_text())
    ends = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    (out / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ends}))
    return out


@pytest.mark.parametrize("kind", full_except(CLASSES, ["gemma3", "llava", "qwen2_5_vl", "smolvlm"]))
def test_the_text_model_and_a_written_adapter_act_as_in_transformers_and_peft(folders, tmp_path, kind):
    base, model = jcl.open_base(folders(kind)), tiny_wrapped(kind)
    plain = theirs(model)
    np.testing.assert_allclose(ours(base), plain, **TOLERANCE)
    adapter = small_adapter(base)
    out = jcl.save_adapter(adapter, tmp_path / "out", base=base)
    found = theirs(peft.PeftModel.from_pretrained(model, str(out)).eval())
    np.testing.assert_allclose(found, ours(base, adapter), **TOLERANCE)
    assert np.abs(found - plain).max() > 0.1
    again = load_adapter(out, base)
    assert split_fused(again, base.fused).modules.keys() == adapter.modules.keys()
    assert not again.info.ignored
    assert all(item.reads for item in check_engines(out, base=base) if item.engine in ("PEFT", "vLLM", "SGLang"))


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_5_vl", "smolvlm"])
def test_bases_are_opened_under_the_names_of_files_and_of_live_models(folders, tmp_path, kind):
    base, model = jcl.open_base(folders(kind)), tiny_wrapped(kind)
    live = jcl.open_base(model)
    shutil.copy(folders(kind) / "config.json", tmp_path)
    save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    called = [name for name, _ in model.named_modules() if name.endswith(".layers.0.mlp.up_proj")]
    for other in (live, jcl.open_base(tmp_path)):
        assert [class_module_name("model.layers.0.mlp.up_proj", other.prefix)] == called
        assert other.tied == base.tied
        assert all(np.array_equal(other.weight(name), base.weight(name)) for name in base.modules)
        assert not any("vis" in name for name in other.store.names())


@pytest.mark.parametrize("prefix", [outer for outer, inner in TEXT_PREFIXES.items() if inner == "model."])
def test_adapters_are_read_under_every_prefix_and_exported_under_that_of_the_base(folders, tmp_path, prefix):
    base = jcl.open_base(folders("smolvlm"))
    adapter = small_adapter(base, roles=("q_proj", "up_proj"))
    right = jcl.save_adapter(adapter, tmp_path / "right", base=base)
    other = renamed(right, tmp_path / "other", prefix)
    assert load_adapter(other, base).modules.keys() == adapter.modules.keys()
    jcl.export_adapter(jcl.ExportSettings((str(other),), str(tmp_path / "mended"), base=base.ref))
    assert load_file(tmp_path / "mended/adapter_model.safetensors").keys() == set(
        load_file(right / "adapter_model.safetensors")
    )
    # Without a base the names of the file are kept.
    jcl.export_adapter(jcl.ExportSettings((str(other),), str(tmp_path / "kept")))
    assert load_file(tmp_path / "kept/adapter_model.safetensors").keys() == set(
        load_file(other / "adapter_model.safetensors")
    )


@pytest.mark.parametrize("prefix", [outer for outer, inner in TEXT_PREFIXES.items() if inner == "model."])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.lora_A.weight", "lm_head", "lm_head.lora_B.weight"])
def test_names_of_a_class_are_those_of_its_text_model_again(prefix, name):
    called = class_module_name(name, prefix)
    assert text_module_name(called) == name
    assert called.startswith(prefix) or "lm_head" in name


def test_an_adapter_that_would_do_nothing_is_found_and_mended(folders, tmp_path, capsys):
    base, plain = jcl.open_base(folders("gemma3")), theirs(tiny_wrapped("gemma3"))
    adapter = small_adapter(base)
    wrong = renamed(jcl.save_adapter(adapter, tmp_path / "right", base=base), tmp_path / "wrong", "model.")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        idle = peft.PeftModel.from_pretrained(tiny_wrapped("gemma3"), str(wrong))
    np.testing.assert_allclose(theirs(idle), plain, atol=1e-6)
    main(["check", str(wrong)])
    assert "not looked up in the base; name it with --base" in capsys.readouterr().out
    verdicts = {item.engine: item for item in check_engines(wrong, base=base)}
    for engine in ("PEFT", "vLLM"):
        assert not verdicts[engine].reads
        (reason,) = verdicts[engine].reasons
        assert reason.startswith("14 of 14 modules are not in the base and would do nothing, without an error: model.l")
        assert "which the base calls model.language_model.layers.0" in reason
        assert "jcrosslora export --base" in reason
    main(["export", str(wrong), "--base", base.ref, "--out", str(tmp_path / "mended")])
    main(["check", str(tmp_path / "mended"), "--base", base.ref])
    assert "would do nothing" not in capsys.readouterr().out
    mended = peft.PeftModel.from_pretrained(tiny_wrapped("gemma3"), str(tmp_path / "mended"))
    np.testing.assert_allclose(theirs(mended), ours(base, adapter), **TOLERANCE)


def test_names_of_transformers_4_are_right_for_vllm_alone(folders, tmp_path):
    base = jcl.open_base(folders("llava"))
    right = jcl.save_adapter(small_adapter(base), tmp_path / "right", base=base)
    old = renamed(right, tmp_path / "old", "language_model.model.")
    reads = {item.engine: item.reads for item in check_engines(old, base=base)}
    assert (reads["PEFT"], reads["vLLM"]) == (False, True)


ENDS = {
    "PEFT": "and would do nothing, without an error: model.layers.1.",
    "vLLM": "and would do nothing, without an error: model.layers.1.",
    "SGLang": "and would not be applied: model.layers.1.",
    "llama.cpp": "which its converter refuses: model.layers.1.",
    "MLX": "and would do nothing, without an error: model.layers.1.",
}


@pytest.mark.parametrize("profile", ["portable", "mlx", "gguf"])
def test_modules_that_a_base_does_not_have_are_named(tmp_path, profile):
    base = jcl.open_base(save_tiny("llama", tmp_path / "base", num_hidden_layers=1))
    deeper = jcl.open_base(save_tiny("llama", tmp_path / "deeper", num_hidden_layers=2))
    out = jcl.save_adapter(small_adapter(deeper), tmp_path / "out", base=deeper, profile=profile)
    judged = {"portable": list(ENDS)[:4], "mlx": ["MLX"], "gguf": ["llama.cpp"]}[profile]
    ends = ENDS | {"llama.cpp": "which is refused: blk.1."} if profile == "gguf" else ENDS
    right, wrong = ({one.engine: one for one in check_engines(out, base=own)} for own in (deeper, base))
    for engine in judged:
        assert right[engine].reads
        (reason,) = wrong[engine].reasons
        assert f"7 of 14 modules are not in the base {ends[engine]}" in reason
        assert "which the base does not have" in reason


def test_what_belongs_to_the_vision_tower_is_listed_and_the_rest_moves(folders, tmp_path):
    base, model = jcl.open_base(folders("gemma3")), tiny_wrapped("gemma3")
    trained = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2)
    trained.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", base)
    assert list(adapter.modules) == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    (sentence,) = adapter.info.ignored
    assert sentence.startswith("updates of other parts than the text model, model.vision_tower.")
    moved = jcl.transfer(tmp_path / "adapter", folders("gemma3"), folders("gemma3"), method="copy")
    assert any("vision_tower" in warning for warning in moved.report.warnings)
    assert any("Gemma3ForConditionalGeneration" in warning for warning in moved.report.warnings)
    found = theirs(peft.PeftModel.from_pretrained(tiny_wrapped("gemma3"), str(moved.save(tmp_path / "moved"))))
    np.testing.assert_allclose(found, theirs(trained.eval()), **TOLERANCE)


def test_between_a_text_model_and_a_multimodal_class(folders, tmp_path):
    """A moved adapter has the names of its target, whatever those of its source were."""
    text = jcl.open_base(save_tiny("llama", tmp_path / "text", seed=5, num_hidden_layers=2, head_dim=16))
    wrapped = jcl.open_base(folders("llava"))
    for source, target, start in ((text, wrapped, "model.language_model."), (wrapped, text, "model.layers.")):
        adapter = jcl.save_adapter(small_adapter(source), tmp_path / f"from {start}", base=source)
        out = jcl.transfer(adapter, source, target, method="pad-truncate").save(tmp_path / start)
        assert all(
            name.startswith(f"base_model.model.{start}") for name in load_file(out / "adapter_model.safetensors")
        )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "form",
    [
        {"target_modules": ["embed_tokens", "v_proj"], "exclude_modules": ".*vision.*"},
        {"target_modules": ["v_proj"], "exclude_modules": ".*vision.*", "trainable_token_indices": [3, 5]},
        {"target_modules": ["v_proj"], "exclude_modules": ".*vision.*", "modules_to_save": ["lm_head"]},
    ],
)
def test_embedding_and_head_are_written_under_the_names_of_the_class(folders, tmp_path, form):
    base, model = jcl.open_base(folders("llava")), tiny_wrapped("llava")
    trained = peft.get_peft_model(model, peft.LoraConfig(r=2, **form))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    settings = jcl.ExportSettings((str(tmp_path / "adapter"),), str(tmp_path / "out"), profile="peft", base=base.ref)
    assert not jcl.export_adapter(settings).adapter.info.ignored
    found = theirs(peft.PeftModel.from_pretrained(tiny_wrapped("llava"), str(tmp_path / "out")).eval())
    np.testing.assert_allclose(found, theirs(trained.eval()), **TOLERANCE)


@pytest.mark.parametrize("kind", ["gemma3", "smolvlm"])
def test_an_adapter_goes_into_a_live_model(folders, kind):
    base, model = jcl.open_base(folders(kind)), tiny_wrapped(kind)
    adapter = small_adapter(base)
    moved = jcl.transfer(adapter, base, base, method="copy")
    np.testing.assert_allclose(theirs(moved.to_peft(model).eval()), ours(base, adapter), **TOLERANCE)


@pytest.mark.parametrize("kind", ["gemma3", "smolvlm"])
def test_a_merged_class_keeps_all_its_parts(folders, tmp_path, kind):
    base = jcl.open_base(folders(kind))
    adapter = small_adapter(base)
    folder = jcl.save_adapter(adapter, tmp_path / "adapter", base=base)
    jcl.merge(jcl.MergeSettings(base.ref, str(folder), str(tmp_path / "merged")))
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(theirs(merged), ours(base, adapter), **TOLERANCE)
    state = tiny_wrapped(kind).state_dict()
    assert all(torch.equal(merged.state_dict()[name], state[name]) for name in state if "vision" in name)


def config_of(kind, **text):
    return transformers.AutoConfig.for_model(kind, text_config=TEXT | CLASSES[kind][0] | text).to_dict()


@pytest.mark.parametrize("kind", CLASSES)
def test_a_text_config_without_its_defaults_means_what_transformers_means(kind):
    text_type = CLASSES[kind][0]["model_type"]
    config = {"model_type": class_of(kind), "text_config": {"model_type": text_type}}
    if text_type in (
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen3_vl_text",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "gemma3_text",
    ):
        config["text_config"] |= {key: TEXT[key] for key in TEXT if key.endswith(("_size", "_layers", "_heads"))}
    wanted = transformers.AutoConfig.for_model(**config).text_config
    checked = check_config(config, kind)
    found = read_dims(checked, kind)
    widths = ("shared_expert_intermediate_size", "intermediate_size_mlp", "intermediate_size")
    width = next(own for name in widths if (own := getattr(wanted, name, None)))
    assert (found.hidden, found.intermediate, found.layers, found.heads, found.kv_heads, found.vocab) == (
        *(wanted.hidden_size, width, wanted.num_hidden_layers, wanted.num_attention_heads),
        *(wanted.num_key_value_heads, wanted.vocab_size),
    )
    assert checked.values.get("rms_norm_eps", checked.family.eps.default) == wanted.rms_norm_eps
    if text_type not in ("gemma3_text", "gemma4_text", "gemma4_unified_text"):
        assert checked.values.get("rope_theta", checked.family.positions.theta) == wanted.rope_parameters["rope_theta"]


def test_settings_at_the_top_of_older_files_are_those_of_the_text_model():
    config = config_of("qwen2_5_vl")
    text = config.pop("text_config")
    flat = {key: value for key, value in (config | text).items() if key != "model_type" and value is not None}
    flat |= {"model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    flat |= {"rope_theta": 1e6, "tie_word_embeddings": True}
    flat.pop("rope_parameters")
    checked = check_config(flat, "config.json")
    assert checked.family.name == "qwen2"
    assert read_dims(checked, "config.json").hidden == TEXT["hidden_size"]
    assert checked.values["rope_scaling"] == {"type": "default"}
    assert checked.values["tie_word_embeddings"] is True


# Parts of published configurations that no class of transformers 5 writes.
PUBLISHED = {
    "SmolVLM-256M": (
        {
            "architectures": ["Idefics3ForConditionalGeneration"],
            "model_type": "idefics3",
            "image_token_id": 49190,
            "scale_factor": 4,
            "tie_word_embeddings": False,
            "transformers.js_config": {"dtype": "fp16"},
            "use_cache": True,
            "vocab_size": 49280,
            "vision_config": {"hidden_size": 768},
            "text_config": {
                "_flash_attn_2_enabled": True,
                "architectures": ["VLlama3ForCausalLM"],
                "head_dim": 64,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "is_llama_config": True,
                "model_type": "llama",
                "neftune_noise_alpha": 0.0,
                "num_attention_heads": 9,
                "num_hidden_layers": 30,
                "num_key_value_heads": 3,
                "perceiver_config": {"resampler_depth": 6},
                "pixel_shuffle_factor": 4,
                "qk_layer_norms": False,
                "rope_interleaved": False,
                "use_resampler": False,
                "vocab_size": 49280,
            },
        },
        (576, 30, 9, 3, 49280),
    ),
    "llava-1.5-7b": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "ignore_index": -100,
            "image_token_index": 32000,
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vision_config": {"model_type": "clip_vision_model"},
            "vocab_size": 32064,
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5",
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "rms_norm_eps": 1e-5,
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
        },
        (4096, 32, 32, 32, 32064),
    ),
    "Qwen2.5-VL-3B": (
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "max_window_layers": 70,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "rope_theta": 1e6,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vision_config": {"depth": 32},
            "vision_token_id": 151654,
            "vocab_size": 151936,
        },
        (2048, 36, 16, 2, 151936),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_accepted(name):
    config, sizes = PUBLISHED[name]
    found = read_dims(check_config(config, name), name)
    assert (found.hidden, found.layers, found.heads, found.kv_heads, found.vocab) == sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"model_type": "opt"}}, "the text_config of this llava is of model_type 'opt', which is not"),
        ({"text_config": {"model_type": "gemma3"}}, "of model_type 'gemma3', which is not supported"),
        ({"text_config": {"model_type": ["llama"]}}, "of model_type \"\\['llama'\\]\""),
        ({"text_config": [1]}, "expected a JSON object"),
        ({"text_config": {"model_type": "llama", "new_key": 3}}, "'new_key'=3"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "supported: LlavaForConditionalGeneration"),
        ({"audio_config": {"x": 1}}, "'audio_config'"),
        ({"strange": 0}, "'strange'=0"),
        ({"model_type": "gemma3n"}, "model_type 'gemma3n' is not supported"),
    ],
)
def test_other_classes_and_text_models_are_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        check_config({"model_type": "llava", "text_config": {"model_type": "llama"}} | change, "config.json")


def test_mlx_holds_the_text_model_as_language_model(folders, tmp_path):
    base = jcl.open_base(folders("gemma3"))
    adapter = small_adapter(base, roles=("v_proj",))
    out = jcl.save_adapter(adapter, tmp_path / "mlx", base=base, profile="mlx")
    names = load_file(out / "adapters.safetensors")
    assert all(name.startswith("language_model.model.layers.") for name in names)
    assert {one.engine for one in check_engines(out, base=base) if one.reads} == {"MLX"}
    text = jcl.save_adapter(adapter, tmp_path / "text", profile="mlx")
    (reason,) = next(one for one in check_engines(text, base=base) if one.engine == "MLX").reasons
    assert "which the base calls language_model.model.layers.0.self_attn.v_proj" in reason
    assert "export --profile mlx --base" in reason
    assert load_adapter(out, base).modules.keys() == adapter.modules.keys()
