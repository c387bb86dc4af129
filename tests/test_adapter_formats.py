"""Adapters of MLX and llama.cpp: files of this package and of mlx_lm are read, damaged ones are refused."""

import contextlib
import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from adapter_folders import Q, matrix
from command_line import main
from engine_readers import llama_cpp_log_probs
from gguf_files import gguf, permute, small_llama
from rich.console import Console
from tiny_bases import delta, mixed_ranks, random_adapter, write_llama
from tiny_models import FAMILIES, save_tiny
from transfers import move_files

import jcrosslora as jcl
from jcrosslora.adapter import check_engines, fuse, load_adapter
from jcrosslora.errors import AdapterError, CheckpointError
from jcrosslora.report.inspect import open_any, print_description

FILES = {"mlx": "adapters.safetensors", "gguf": "adapter.gguf"}


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(request, tmp_path_factory):
    return jcl.open_base(save_tiny(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return jcl.open_base(write_llama(tmp_path_factory.mktemp("llama"), layers=2))


@pytest.mark.parametrize("given", [True, False], ids=["with its base", "alone"])
@pytest.mark.parametrize("profile", FILES)
def test_exported_adapters_are_read_back(base, tmp_path, profile, given):
    adapter = mixed_ranks(base)
    out = jcl.save_adapter(adapter, tmp_path / "o", base=base, base_name="org/name", profile=profile)
    back = load_adapter(out, base if given else None)
    wanted = fuse(adapter.modules, base.fused)
    assert back.modules.keys() == wanted.keys()
    for name, factors in wanted.items():
        np.testing.assert_allclose(delta(back.modules[name]), delta(factors), rtol=0, atol=1e-6)
    info = back.info
    assert (info.kind, info.read_as, info.ignored, info.base_name) == ("LoRA", None, (), "org/name")
    assert info.form == profile.upper()
    assert info.digest is not None


def test_gguf_adapters_are_transferred_like_others(tmp_path):
    """Fused updates are split, and the source is a file instead of a folder."""
    source = jcl.open_base(save_tiny("phi3", tmp_path / "source"))
    target = jcl.open_base(save_tiny("llama", tmp_path / "target"))
    adapter = random_adapter(source)
    jcl.save_adapter(adapter, tmp_path / "gguf", base=source, profile="gguf")
    where = {"source": str(source.path), "target": str(target.path), "method": "pad-truncate", "effect": "never"}
    move_files(str(tmp_path / "gguf" / "adapter.gguf"), out=str(tmp_path / "o"), **where)
    moved = load_adapter(tmp_path / "o")
    assert moved.modules.keys() == target.modules.keys()
    for name, factors in moved.modules.items():
        np.testing.assert_allclose(delta(factors), delta(adapter.modules[name]), rtol=0, atol=1e-4)
    exported = jcl.ExportSettings((str(tmp_path / "gguf"),), str(tmp_path / "mlx"), "mlx")
    jcl.export_adapter(exported)
    assert load_adapter(tmp_path / "mlx").modules.keys() == fuse(adapter.modules, source.fused).keys()


class _Tokens(list):
    """Make rows of tokens as mlx_lm's training expects them."""

    def process(self, row):
        return row


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_trained_by_mlx_lm_are_read(tmp_path, kind):
    """Train two steps with mlx_lm; the weights that its layers fuse are the oracle."""
    mlx_lora = pytest.importorskip("mlx_lm.lora")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    base = jcl.open_base(save_tiny("llama", tmp_path / "base"))
    model = load_model(base.path)[0]
    settings = {"model": str(base.path), "fine_tune_type": kind, "num_layers": 2, "adapter_path": str(tmp_path / "a")}
    steps = {"iters": 2, "batch_size": 1, "val_batches": 0, "save_every": 2, "learning_rate": 0.01}
    parameters = {"lora_parameters": {"rank": 3, "dropout": 0.0, "scale": 5.0}}
    rows = _Tokens([([5, 9, 30, 7, 61, 44, 12, 3], 0)] * 2)
    mx.disable_compile()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            settings = mlx_lora.CONFIG_DEFAULTS | settings | steps | parameters
            mlx_lora.train_model(SimpleNamespace(**settings), model, rows, rows)
    finally:
        mx.enable_compile()
    found = load_adapter(tmp_path / "a", base, rank=48)
    assert len(found.modules) == 2 * 7
    assert found.info.kind == {"lora": "LoRA", "dora": "DoRA"}[kind]
    for name, layer in model.named_modules():
        if name in found.modules:
            update = np.array(layer.fuse().weight) - base.weight(name)
            assert np.abs(update).max() > 0.01
            np.testing.assert_allclose(delta(found.modules[name]), update, rtol=0, atol=1e-6)
    verdicts = {each.engine: each.reads for each in check_engines(tmp_path / "a")}
    assert [engine for engine, reads in verdicts.items() if reads] == ["MLX"]


def write_mlx(folder, config=None, weights=None, **parameters):
    folder.mkdir()
    stated = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 2, "scale": 2.5} | parameters}
    (folder / "adapter_config.json").write_text(json.dumps(stated | (config or {})))
    plain = {f"{Q}.lora_a": matrix(6, 2), f"{Q}.lora_b": matrix(2, 5)}
    safetensors.numpy.save_file(plain if weights is None else weights, folder / "adapters.safetensors")
    return folder


def test_parts_of_an_mlx_adapter_that_do_not_move_are_listed(tmp_path):
    more = {"model.embed_tokens.lora_a": matrix(9, 2), "model.embed_tokens.lora_b": matrix(2, 6)}
    more |= {"lm_head.lora_a": matrix(6, 2), "lm_head.lora_b": matrix(2, 9)}
    outer = Q.replace("model.", "language_model.model.", 1)
    layer = {f"{outer}.lora_a": matrix(6, 2), f"{outer}.lora_b": matrix(2, 5)}
    adapter = load_adapter(write_mlx(tmp_path / "a", None, layer | more, alpha=16))
    np.testing.assert_allclose(delta(adapter.modules[Q]), 2.5 * matrix(2, 5).T @ matrix(6, 2).T, atol=1e-6)
    said = " ".join(adapter.info.ignored)
    assert [word in said for word in ("alpha of lora_parameters", "of an embedding", "output head")] == [True] * 3


@pytest.mark.parametrize("profile", ["merged", "peft"])
def test_a_lora_of_mlx_on_a_tied_embedding_also_acts_on_the_head(tmp_path, profile):
    """As in mlx_lm, where the head of a tied base is `LoRAEmbedding.as_linear`, which adds the update."""
    base = jcl.open_base(write_llama(tmp_path / "base"))
    old = base.tensor("model.embed_tokens.weight")
    a, b = matrix(old.shape[0], 2), matrix(2, old.shape[1])
    folder = write_mlx(tmp_path / "a", None, {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b})
    if profile == "peft":
        jcl.export_adapter(jcl.ExportSettings((str(folder),), str(tmp_path / "p"), profile="peft", base=base.ref))
        folder = tmp_path / "p"
    jcl.merge(jcl.MergeSettings(base.ref, str(folder), str(tmp_path / "merged")))
    merged = jcl.open_base(tmp_path / "merged")
    assert merged.tied
    np.testing.assert_allclose(merged.tensor("model.embed_tokens.weight"), old + 2.5 * a @ b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "weights", "named"),
    [
        ({"fine_tune_type": "full"}, None, "whole weights of the model"),
        ({"fine_tune_type": ["x"]}, None, "not known"),
        ({"lora_parameters": None}, None, "lora_parameters is None"),
        ({"lora_parameters": {"rank": 2}}, None, "scale of lora_parameters is missing"),
        ({"lora_parameters": {"rank": 2.5, "scale": 1.0}}, None, "rank of lora_parameters is 2.5"),
        ({"lora_parameters": {"rank": 3, "scale": 1.0}}, None, "has rank 2"),
        ({}, {f"{Q}.lora_a": matrix(6, 2)}, "lora_A without its lora_B"),
        ({}, {f"{Q}.weight": matrix(5, 6)}, "is not a lora_a, lora_b or m"),
        ({}, {f"{Q}.lora_a": matrix(6, 2), f"{Q}.lora_b": matrix(4, 5, 2)}, "expected a matrix"),
        ({"fine_tune_type": "dora"}, None, "no lora_magnitude_vector"),
        ({}, {}, "empty"),
    ],
)
def test_damaged_or_other_mlx_adapters_are_refused(tmp_path, config, weights, named):
    with pytest.raises(AdapterError) as caught:
        load_adapter(write_mlx(tmp_path / "a", config, weights))
    assert named in str(caught.value)


def write_adapter(path, arch="llama", tensors=None, *, drop=(), quantised=None, **metadata):
    """Write a GGUF adapter as llama.cpp's converter does, without the numbers of heads."""
    writer = gguf.GGUFWriter(path, arch)
    stated = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 5.0} | metadata
    for key, value in stated.items():
        if key not in drop:
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, array in tensors.items():
        if quantised is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Shapes of q and v of `write_llama`.
A_Q, B_Q, B_V = matrix(2, 48), matrix(48, 2, seed=1), matrix(24, 2, seed=2)
PAIRS = {
    "blk.0.attn_q.weight.lora_a": A_Q,
    "blk.0.attn_q.weight.lora_b": permute(B_Q, 4),
    "blk.1.attn_v.weight.lora_a": A_Q,
    "blk.1.attn_v.weight.lora_b": B_V,
}
V_ALONE = {name: array for name, array in PAIRS.items() if "attn_v" in name}


def test_the_rows_of_q_and_k_take_the_heads_of_the_base(llama, tmp_path):
    path = write_adapter(tmp_path / "x.gguf", tensors=PAIRS)
    adapter = load_adapter(path, llama)
    np.testing.assert_allclose(delta(adapter.modules[Q]), 2.5 * B_Q @ A_Q, atol=1e-6)
    with pytest.raises(AdapterError, match="depends on the heads of the base: the source base is needed"):
        load_adapter(path)
    of_v = load_adapter(write_adapter(tmp_path / "v.gguf", tensors=V_ALONE))
    np.testing.assert_allclose(delta(of_v.modules["model.layers.1.self_attn.v_proj"]), 2.5 * B_V @ A_Q, atol=1e-6)


@pytest.mark.parametrize("metadata", [{"adapter.lora.alpha": 0.0}, {"drop": ["adapter.lora.alpha"]}])
def test_a_gguf_adapter_without_alpha_is_not_scaled(tmp_path, metadata):
    other = {f"blk.0.attn_v.weight.lora_{side}": array for side, array in (("a", matrix(3, 48)), ("b", matrix(24, 3)))}
    adapter = load_adapter(write_adapter(tmp_path / "x.gguf", tensors=V_ALONE | other, **metadata))
    assert [factors.scale for factors in adapter.modules.values()] == [1.0, 1.0]
    assert [factors.rank for factors in adapter.modules.values()] == [3, 2]


def test_a_quantised_adapter_is_dequantised(tmp_path):
    wide = {"blk.0.ffn_down.weight.lora_a": matrix(32, 96), "blk.0.ffn_down.weight.lora_b": matrix(48, 32, seed=1)}
    kind = gguf.GGMLQuantizationType.Q8_0
    found = load_adapter(write_adapter(tmp_path / "x.gguf", "qwen2", wide, quantised=kind)).modules
    a, b = (gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind) for array in wide.values())
    np.testing.assert_allclose(delta(found["model.layers.0.mlp.down_proj"]), 5 / 32 * b @ a, rtol=1e-5, atol=1e-5)


def test_parts_of_a_gguf_adapter_that_do_not_move_are_listed(tmp_path):
    embedding = {"token_embd.weight.lora_a": matrix(96, 2), "token_embd.weight.lora_b": matrix(48, 2)}
    head = {"output.weight.lora_a": A_Q, "output.weight.lora_b": matrix(96, 2)}
    norm = {"blk.0.attn_norm.weight": matrix(48)}
    adapter = load_adapter(write_adapter(tmp_path / "x.gguf", tensors=V_ALONE | embedding | head | norm))
    assert list(adapter.modules) == ["model.layers.1.self_attn.v_proj"]
    said = " ".join(adapter.info.ignored)
    assert [word in said for word in ("of an embedding", "output head", "input_layernorm")] == [True] * 3
    assert "%" in said


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"general.type": "model"}, "is a GGUF of type 'model', expected an adapter"),
        ({"adapter.type": "dora"}, "adapter.type is 'dora'"),
        ({"arch": "mamba"}, "architecture 'mamba' is not supported"),
        ({"arch": "qwen2"}, "is of family llama: give the base it was trained on"),
        ({"adapter.lora.alpha": float("nan")}, "adapter.lora.alpha is nan"),
        ({"tensors": PAIRS | {"blk.0.attn_q.bias": matrix(48)}}, "'blk.0.attn_q.bias' is not one of a LoRA"),
        ({"tensors": {"blk.x.attn_v.weight.lora_a": A_Q}}, "is not one of a LoRA"),
        ({"tensors": {"blk.0.unknown.weight.lora_a": A_Q}}, "is not one of a LoRA"),
        ({"tensors": {"blk.0.attn_v.weight.lora_a": A_Q}}, "lora_A without its lora_B"),
        ({"tensors": V_ALONE | {"blk.1.attn_v.weight.lora_b": matrix(24, 3)}}, "of one rank"),
        ({"tensors": PAIRS | {"blk.0.attn_q.weight.lora_b": matrix(12, 2)}}, "do not split into 4 heads"),
        ({"tensors": V_ALONE | {"blk.1.attn_v.weight.lora_b": np.full((24, 2), np.nan, np.float32)}}, "NaN"),
        ({"tensors": {}}, "empty"),
    ],
)
def test_damaged_or_other_gguf_adapters_are_refused(llama, tmp_path, given, named):
    path = write_adapter(tmp_path / "x.gguf", **({"tensors": PAIRS} | given))
    with pytest.raises(AdapterError) as caught:
        load_adapter(path, llama)
    assert named in str(caught.value)


def test_other_numbers_of_heads_than_in_the_base_are_refused(llama, tmp_path):
    other = jcl.open_base(write_llama(tmp_path / "other", layers=2, heads=8, kv_heads=4, head_dim=6))
    out = jcl.save_adapter(random_adapter(llama), tmp_path / "o", base=llama, profile="gguf")
    with pytest.raises(AdapterError, match=r"of \(4, 2\) query and key heads, this one has \(8, 4\)"):
        load_adapter(out, other)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_files_are_refused_with_one_line(llama, tmp_path, keep):
    for profile, file in FILES.items():
        path = jcl.save_adapter(random_adapter(llama), tmp_path / profile, base=llama, profile=profile) / file
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(AdapterError, match=file) as caught:
            load_adapter(path.parent, llama)
        assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(AdapterError, match=file):
            check_engines(path.parent)


def test_invocation_tokens_survive_gguf_and_load_in_llama_cpp(tmp_path):
    path, _ = small_llama(tmp_path / "base.gguf", tokens=("llama", [f"w{index}" for index in range(10)], [1] * 10))
    base = jcl.open_base(path)
    adapter = random_adapter(base, scale=0.1)
    bound = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, invocation=(5, 7)))
    out = jcl.save_adapter(bound, tmp_path / "o", base=base, profile="gguf")
    back = load_adapter(out)
    assert (back.info.kind, back.info.invocation) == ("aLoRA", (5, 7))
    llama_cpp_log_probs(path, out / "adapter.gguf", [1, 2, 3], 10)
    reads = {verdict.engine for verdict in check_engines(out) if verdict.reads}
    assert reads == {"llama.cpp"}


def test_check_and_inspect_know_the_formats(llama, tmp_path, capsys):
    gguf_file = jcl.save_adapter(random_adapter(llama), tmp_path / "g", base=llama, profile="gguf") / "adapter.gguf"
    assert {each.engine for each in check_engines(gguf_file, "llama") if each.reads} == {"llama.cpp", "Ollama"}
    assert not any(each.reads for each in check_engines(gguf_file.parent, "qwen2"))
    mlx = jcl.save_adapter(random_adapter(llama), tmp_path / "m", base=llama, profile="mlx")
    assert {each.engine for each in check_engines(mlx) if each.reads} == {"MLX"}
    for path, form in ((gguf_file, "GGUF"), (gguf_file.parent, "GGUF"), (mlx, "MLX")):
        with Console(width=200) as console:
            print_description(open_any(str(path)), console)
        shown = capsys.readouterr().out
        assert f"(format of {form})" in shown
        assert "can be moved: 14 modules" in shown
    main(["check", str(gguf_file)])
    assert "loras are not yet implemented" in capsys.readouterr().out
    for bad in ({"tensors": {}, "adapter.type": "x"}, {"tensors": {"blk.0.attn_v.weight": A_Q}}):
        other = write_adapter(tmp_path / "bad.gguf", **bad)
        assert not any(each.reads for each in check_engines(other))
        with pytest.raises(CheckpointError, match="where a base model was expected"):
            jcl.open_base(other)
    rank = write_mlx(tmp_path / "rank", rank=3)
    assert not any(each.reads for each in check_engines(rank))


def test_an_incomplete_adapter_folder_names_the_missing_file(tmp_path):
    folder = write_mlx(tmp_path / "a")
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapters\.safetensors here"):
        load_adapter(folder)


@pytest.mark.parametrize("profile", ["gguf", "tunix", "mlx", "peft"])
def test_documents_are_read_from_the_folder_of_an_adapter_and_not_from_neighbours(tmp_path, profile):
    base = jcl.open_base(write_llama(tmp_path / "base"))
    adapter = load_adapter(jcl.save_adapter(random_adapter(base), tmp_path / "first", base=base))
    adapter = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, chat_template="{{ messages }}"))
    folder = jcl.save_adapter(adapter, tmp_path / "own", base=base, profile=profile)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    found = load_adapter(folder, base).info
    assert (found.chat_template, found.licence) == ("{{ messages }}", "mit")
    if profile == "gguf":
        assert load_adapter(folder / "adapter.gguf", base).info.licence == "mit"
        (folder / "adapter.gguf").rename(folder / "mine.gguf")  # among those of others
        found = load_adapter(folder / "mine.gguf", base).info
        assert (found.chat_template, found.licence, found.earlier) == (None, None, ())


def test_an_mlx_adapter_comes_from_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    folder, asked = write_mlx(tmp_path / "snapshot"), []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name, revision, **_: asked.append(name) or str(folder / name)
    )
    assert list(load_adapter("owner/adapter").modules) == [Q]
    assert asked == ["adapter_config.json", "README.md", "chat_template.jinja", "adapters.safetensors"]
