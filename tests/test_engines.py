"""Engine rules: each rule refuses the adapters that break it, and no others."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from adapter_folders import CONFIG, Q, V, adapter_of, matrix, tensors, write_folder
from adapters_of_all import adapter_of_all
from command_line import main
from dense_models import random_model
from engine_readers import llama_cpp_log_probs
from expert_models import EXPERT_VARIANTS
from gguf_files import gguf, small_llama
from hybrid_models import HYBRIDS
from kind_cases import peft
from tiny_models import save_tiny, tiny_model

import jcrosslora as jcl
from jcrosslora.adapter import EngineVerdict, check_engines, folder, load_adapter, save_adapter
from jcrosslora.adapter.engines.tables import VLLM_RANKS
from jcrosslora.adapter.truncation import AUTO_RANKS
from jcrosslora.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ALL = ("PEFT", "vLLM", "SGLang", "llama.cpp", "MLX", "Ollama", "tunix")


def verdicts(folder, family=None) -> dict[str, EngineVerdict]:
    return {verdict.engine: verdict for verdict in check_engines(folder, base_family=family)}


def readers(folder, family=None) -> set[str]:
    result = verdicts(folder, family)
    assert tuple(result) == ALL
    for verdict in result.values():
        assert verdict.reads == (not verdict.reasons)
        assert not any("\n" in text for text in verdict.reasons + verdict.notes)
    return {name for name, verdict in result.items() if verdict.reads}


def test_a_portable_export_is_read_by_every_reader_of_peft(tmp_path):
    out = save_adapter(adapter_of({Q: 2, V: 3}), tmp_path / "o")
    assert readers(out, "llama") == {"PEFT", "vLLM", "SGLang", "llama.cpp", "Ollama"}
    assert readers(out, "qwen2") == {"PEFT", "vLLM", "SGLang", "llama.cpp"}
    assert any("gemma2" in note for note in verdicts(out)["Ollama"].notes)


def test_patterns_are_refused_by_engines_with_one_scale(tmp_path):
    out = save_adapter(adapter_of({Q: 2, V: 2, V.replace("1", "2"): 3}), tmp_path / "o", profile="peft")
    assert readers(out, "llama") == {"PEFT", "vLLM"}
    assert any("older releases" in note for note in verdicts(out)["vLLM"].notes)


# Change of a plain configuration -> engines that still read it (MLX never does).
CASES = [
    ({}, {"PEFT", "vLLM", "SGLang", "llama.cpp", "Ollama"}),
    ({"use_rslora": True}, {"PEFT", "vLLM"}),
    ({"alpha_pattern": {"q_proj": 8}}, {"PEFT", "vLLM"}),
    ({"alpha_pattern": {"q_proj": 4}}, {"PEFT", "vLLM", "SGLang", "llama.cpp", "Ollama"}),
    ({"lora_alpha": 22.6}, {"PEFT", "vLLM", "SGLang", "llama.cpp"}),
    ({"bias": "lora_only"}, {"PEFT", "SGLang", "llama.cpp", "Ollama"}),
    ({"modules_to_save": ["lm_head"]}, {"PEFT", "SGLang", "llama.cpp", "Ollama"}),
    ({"modules_to_save": ["score"]}, {"PEFT", "vLLM", "SGLang", "llama.cpp", "Ollama"}),
    ({"target_modules": None}, {"PEFT", "llama.cpp", "Ollama"}),
    ({"target_modules": r".*\.(q|v)_proj"}, {"PEFT", "vLLM", "llama.cpp", "Ollama"}),
    ({"target_modules": "all-linear"}, {"PEFT", "vLLM", "SGLang", "llama.cpp", "Ollama"}),
    # Its weight is named in place of the module.
    (
        {"target_modules": ["q_proj"], "target_parameters": [f"{V}.weight"]},
        {"PEFT", "vLLM", "SGLang", "llama.cpp", "Ollama"},
    ),
    (
        {"target_modules": [], "target_parameters": ["q_proj.weight", "v_proj.weight"]},
        {"PEFT", "vLLM", "SGLang", "llama.cpp", "Ollama"},
    ),
    ({"target_parameters": ["mlp.gate.weight"]}, {"PEFT"}),
    ({"use_dora": True}, {"PEFT"}),
    ({"init_lora_weights": "pissa"}, {"PEFT"}),
    ({"init_lora_weights": "pissa_niter_2"}, set()),
    ({"layer_replication": [[0, 1]]}, {"PEFT"}),
    ({"alora_invocation_tokens": [5]}, {"PEFT", "llama.cpp"}),
    ({"peft_type": "VERA"}, {"PEFT"}),
    ({"peft_type": "NEWEST"}, set()),
    ({"r": 3}, set()),
    ({"r": 0}, set()),
    ({"lora_alpha": None}, set()),
]


@pytest.mark.parametrize(("changes", "expected"), CASES, ids=[json.dumps(case[0]) for case in CASES])
def test_each_setting_is_judged_by_each_engine(tmp_path, changes, expected):
    assert readers(write_folder(tmp_path / "a", CONFIG | changes), "llama") == expected


def test_modules_that_only_their_weights_name_are_an_option_of_sglang(tmp_path):
    folder = write_folder(
        tmp_path / "a", CONFIG | {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]}
    )
    assert verdicts(folder)["SGLang"].notes == (
        "it needs --lora-target-modules with v_proj, named by target_parameters",
    )
    assert not verdicts(write_folder(tmp_path / "b"))["SGLang"].notes


def test_ranks_by_pattern_are_read_by_engines_that_use_tensor_shapes(tmp_path):
    """One alpha, two ranks: llama.cpp divides by each tensor's rank as PEFT does; SGLang refuses."""
    config = CONFIG | {"rank_pattern": {"v_proj": 4}}
    folder = write_folder(tmp_path / "a", config, tensors([Q]) | tensors([V], rank=4))
    assert readers(folder, "llama") == {"PEFT", "vLLM", "llama.cpp", "Ollama"}


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("lm_head.weight", (9, 6), {"PEFT", "SGLang"}),
        ("model.embed_tokens.lora_embedding_A", (2, 9), {"PEFT", "vLLM", "SGLang"}),
        ("model.norm.weight", (6,), {"PEFT", "SGLang"}),
        ("lm_head.base_layer.weight", (9, 6), {"PEFT", "vLLM", "SGLang", "llama.cpp"}),
        ("model.embed_tokens.base_layer.weight", (9, 6), {"PEFT", "vLLM", "SGLang", "llama.cpp"}),
        (f"{Q}.base_layer.weight", (5, 6), {"PEFT", "SGLang", "llama.cpp"}),
    ],
)
def test_other_tensors_are_judged_by_each_engine(tmp_path, key, shape, expected):
    folder = write_folder(tmp_path / "a", weights=tensors() | {f"base_model.model.{key}": matrix(*shape)})
    assert readers(folder, "llama") == expected


@pytest.mark.parametrize(
    ("tensor", "tied", "reads"),
    [
        ("model.embed_tokens.lora_embedding_A", None, False),
        ("model.embed_tokens.lora_embedding_A", True, False),
        ("model.embed_tokens.lora_embedding_A", False, True),
        ("lm_head.lora_A.weight", None, True),
        ("lm_head.lora_A.weight", True, False),
        ("lm_head.lora_A.weight", False, True),
    ],
)
def test_llama_cpp_reads_embedding_and_head_if_they_are_two(tmp_path, tensor, tied, reads):
    pair = {tensor: matrix(2, 9), tensor.replace("_A", "_B"): matrix(9, 2)}
    weights = tensors() | {f"base_model.model.{key}": value for key, value in pair.items()}
    folder = write_folder(tmp_path / "a", weights=weights)
    verdict = {each.engine: each for each in check_engines(folder, "llama", base_tied=tied)}["llama.cpp"]
    assert verdict.reads == reads
    assert any("ties" in note for note in verdict.notes) == (reads and tied is None)


def test_check_asks_the_base_for_its_family_and_tie(tmp_path, capsys):
    """The adapter is what peft writes of an embedding that is trained with LoRA, with a copy of the embedding."""
    for tied in (True, False):
        save_tiny("llama", tmp_path / f"{tied}", tie_word_embeddings=tied, num_hidden_layers=1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model = tiny_model("llama", tie_word_embeddings=False, num_hidden_layers=1)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    found = {}
    for tied in (True, False):
        main(["check", str(tmp_path / "a"), "--base", str(tmp_path / f"{tied}"), "--json"])
        found[tied] = {one["engine"] for one in json.loads(capsys.readouterr().out) if one["reads"]}
    assert found == {True: {"PEFT", "vLLM", "SGLang"}, False: {"PEFT", "vLLM", "SGLang", "llama.cpp"}}


def test_repeated_layers_have_numbers_that_the_base_has_not(tmp_path):
    save_tiny("llama", tmp_path / "base", num_hidden_layers=2)
    settings = {"r": 2, "target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)], "init_lora_weights": False}
    model = peft.get_peft_model(tiny_model("llama", num_hidden_layers=2), peft.LoraConfig(**settings))
    model.save_pretrained(tmp_path / "a")
    fresh = peft.get_peft_model(tiny_model("llama", num_hidden_layers=2), peft.LoraConfig(**settings))
    assert not peft.load_peft_weights(tmp_path / "a").keys() ^ peft.get_peft_model_state_dict(fresh).keys()
    found = {one.engine: one for one in check_engines(tmp_path / "a", base=jcl.open_base(tmp_path / "base"))}
    assert found["PEFT"].reads, found["PEFT"].reasons


RUN_LLAMA_CPP = """
import sys
from engine_readers import llama_cpp_log_probs
llama_cpp_log_probs(sys.argv[1], sys.argv[2], [1, 2, 3], 10)
"""
PLAIN = {"blk.0.attn_v.weight.lora_a": matrix(2, 64), "blk.0.attn_v.weight.lora_b": matrix(32, 2)}
EMBEDDING = {"token_embd.weight.lora_a": matrix(10, 2), "token_embd.weight.lora_b": matrix(64, 2)}
HEAD = {"output.weight.lora_a": matrix(2, 64), "output.weight.lora_b": matrix(10, 2)}


def write_gguf_adapter(path, arrays):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_verdicts_on_embedding_head_and_norms_are_those_of_llama_cpp(tmp_path, tied):
    pytest.importorskip("xllamacpp")
    head = {} if tied else {"output.weight": (matrix(10, 64, seed=1), None)}
    words = ("llama", [f"w{index}" for index in range(10)], [1] * 10)
    base, _ = small_llama(tmp_path / "base.gguf", extra=head, tokens=words)
    plain = llama_cpp_log_probs(base, write_gguf_adapter(tmp_path / "plain.gguf", PLAIN), [1, 2, 3], 10)
    for extra in (EMBEDDING, HEAD, {"output_norm.weight": matrix(64)}):
        path = write_gguf_adapter(tmp_path / "adapter.gguf", PLAIN | extra)
        if tied and extra is EMBEDDING:  # ends the process
            command = [sys.executable, "-c", RUN_LLAMA_CPP, str(base), str(path)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=300)
            assert "GGML_ASSERT" in done.stderr
            applied = False
        else:
            try:
                applied = not np.allclose(llama_cpp_log_probs(base, path, [1, 2, 3], 10), plain, atol=1e-3)
            except RuntimeError:
                applied = False
        found = {each.engine: each for each in check_engines(path, "llama", base_tied=tied)}
        assert found["llama.cpp"].reads == applied


def test_ollama_knows_seven_names_and_ranks_below_the_width(tmp_path):
    fused = write_folder(tmp_path / "a", weights=tensors(["model.layers.0.self_attn.qkv_proj"]))
    assert "Ollama" not in readers(fused)
    square = write_folder(tmp_path / "b", weights=tensors(width=2))
    assert "Ollama" not in readers(square)


@pytest.mark.parametrize(("rank", "note"), [(16, None), (17, "32"), (300, "320"), (512, "512"), (513, None)])
def test_vllm_rank_limits(tmp_path, rank, note):
    folder = write_folder(tmp_path / "a", CONFIG | {"r": rank}, tensors(rank=rank, width=1000))
    verdict = verdicts(folder)["vLLM"]
    assert verdict.reads == (rank <= 512)
    flags = [text for text in verdict.notes if "--max-lora-rank" in text]
    assert flags == ([f"rank {rank} needs --max-lora-rank {note}"] if note else [])


def test_automatic_ranks_are_sizes_that_vllm_reserves():
    assert set(AUTO_RANKS) < set(VLLM_RANKS)


def test_names_without_the_prefix_are_not_found_by_peft(tmp_path):
    bare = {key.removeprefix("base_model.model."): value for key, value in tensors().items()}
    assert "PEFT" not in readers(write_folder(tmp_path / "a", weights=bare))


@pytest.mark.parametrize(
    "damage",
    [
        {f"base_model.model.{Q}.lora_A.weight": matrix(3, 6)},
        {f"base_model.model.{Q}.lora_A.weight": matrix(2)},
        {f"base_model.model.{V.replace('1', '2')}.lora_A.weight": matrix(2, 6)},
    ],
)
def test_mismatched_factors_are_read_by_no_engine(tmp_path, damage):
    assert readers(write_folder(tmp_path / "a", weights=tensors() | damage)) == set()


def test_a_folder_of_mlx_is_for_mlx_alone(tmp_path):
    parameters = {"rank": 2, "scale": 2.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = {f"{Q}.lora_a": matrix(6, 2), f"{Q}.lora_b": matrix(2, 5)}
    safetensors.numpy.save_file(weights, tmp_path / "adapters.safetensors")
    assert readers(tmp_path) == {"MLX"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_parameters": {"rank": 2}}))
    assert readers(tmp_path) == set()


@pytest.mark.parametrize("part", ["_lora_latent_mapping.weight", ".lora_gate"])
def test_tensors_between_the_factors_are_read_by_no_engine(tmp_path, part):
    folder = write_folder(tmp_path / "a", CONFIG, tensors() | {f"base_model.model.{Q}{part}": matrix(2, 2)})
    assert readers(folder, "llama") == set()
    assert "own repository reads tensor" in verdicts(folder)["PEFT"].reasons[0]


def test_a_pickle_is_judged_by_its_configuration(tmp_path):
    folder = write_folder(tmp_path / "a", CONFIG | {"r": 64})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    result = verdicts(folder)
    assert any("pickle" in note for note in result["PEFT"].notes)
    assert any("--max-lora-rank 64" in note for note in result["vLLM"].notes)


def test_adapters_that_load_adapter_refuses_can_be_checked(tmp_path):
    config = CONFIG | {"target_parameters": ["mlp.experts.gate_up_proj"]}
    experts = {
        "base_model.model.model.layers.0.mlp.experts.lora_A.weight": matrix(8, 6),
        "base_model.model.model.layers.0.mlp.experts.lora_B.weight": matrix(5, 8),
    }
    folder = write_folder(tmp_path / "a", config, experts)
    with pytest.raises(AdapterError):
        load_adapter(folder)
    assert readers(folder) == {"PEFT"}


@pytest.mark.parametrize("name", ["deepseek_v3", "mistral4", "lfm2_moe", "nemotron_h", "olmoe", "gpt_oss"])
def test_check_says_whether_mlx_lm_has_the_modules(name, tmp_path):
    loaders = pytest.importorskip("mlx_lm.utils")
    random_model(*(EXPERT_VARIANTS | HYBRIDS)[name]).save_pretrained(tmp_path / "base")
    base = jcl.open_base(tmp_path / "base")
    modules = adapter_of_all(base).modules
    outputs = {key: factors for key, factors in modules.items() if key.endswith((".o_proj", ".self_attn.out_proj"))}
    for place, part in enumerate((modules, outputs)):
        out = jcl.save_adapter(jcl.Adapter(part), tmp_path / str(place), base=base, profile="mlx")
        model, _ = loaders.load_model(
            tmp_path / "base", strict=False
        )  # without the experts as transformers stores them
        try:
            taken = loaders.load_adapters(model, str(out)) is not None
        except ValueError as error:
            taken = "not an adapter parameter" not in str(error)
        verdict = next(one for one in check_engines(out, base=base) if one.engine == "MLX")
        assert verdict.reads == taken, verdict.reasons


def test_other_folders_are_refused_with_one_line(tmp_path):
    with pytest.raises(AdapterError, match="no adapter_config"):
        check_engines(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(AdapterError, match="no adapter_model"):
        check_engines(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterError):
        check_engines(tmp_path)


@pytest.mark.parametrize("value", [[], {}, "text", 7, [None, {}], True, [[1]]], ids=str)
@pytest.mark.parametrize("key", [*CONFIG, "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "use_rslora"])
def test_invalid_values_of_known_keys_raise_adapter_errors_only(tmp_path, key, value):
    folder = write_folder(tmp_path / "a", CONFIG | {key: value})
    readers(folder, "llama")
    with suppress(AdapterError):
        assert np.isfinite(load_adapter(folder).modules[Q].scale)


@pytest.mark.parametrize("key", [*CONFIG, "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "use_rslora"])
def test_infinite_values_of_known_keys_are_refused_by_name(tmp_path, key):
    folder = write_folder(tmp_path / "a", CONFIG | {key: 1e400})
    for read in (check_engines, load_adapter):
        with pytest.raises(AdapterError, match=f"config key '{key}' is inf, expected a finite number"):
            read(folder)


def test_an_adapter_of_the_hub_is_checked(tmp_path, capsys, monkeypatch):
    save_adapter(adapter_of({Q: 2}), tmp_path / "a", documents={"chat_template.jinja": "{{ messages }}"})
    monkeypatch.setattr(folder, "_download", lambda repo, name, revision: tmp_path / repo.split("/")[1] / name)
    main(["check", "owner/a"])
    assert "vLLM" in capsys.readouterr().out


def test_an_original_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(tmp_path), "--original", "x"])
    assert stopped.value.code == 2
    assert "add --run" in capsys.readouterr().err
