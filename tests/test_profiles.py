"""One adapter in every profile: the same update through each reader, and the same predictions in each engine."""

import dataclasses
import errno
import json
import sys

import numpy as np
import pytest
from engine_readers import (
    gguf_factors,
    in_profile,
    llama_cpp_log_probs,
    log_softmax,
    mlx_factors,
    mlx_log_probs,
    peft_factors,
)
from full_disk import fill_disk
from full_set import full_except
from gguf_files import ARCHITECTURES, converted, gguf, gguf_name, metadata_of, write_gguf
from tiny_bases import delta, mixed_ranks, random_adapter, write_llama
from tiny_models import FAMILIES, tiny_model, torch

import jcrosslora as jcl
from jcrosslora.adapter import Adapter, fuse
from jcrosslora.errors import AdapterError, OutputError, UsageError

READERS = {"portable": peft_factors, "peft": peft_factors, "mlx": mlx_factors, "gguf": gguf_factors}
EPS = {"float32": 2**-22, "bfloat16": 2**-7, "float16": 2**-9}
HEADS = 4, 2
VOCAB = 96
TOKENS = [5, 9, 30, 7, 61, 44, 12]
# ggml looks up Gemma's GELU in a table of half precision, with or without an adapter.
LLAMA_CPP = {"gemma2": 5e-3, "gemma3_text": 5e-3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return jcl.open_base(write_llama(tmp_path_factory.mktemp("llama"), layers=2))


@pytest.mark.parametrize("profile", READERS)
@pytest.mark.parametrize("dtype", list(EPS))
def test_every_profile_holds_the_same_update(llama, tmp_path, profile, dtype):
    adapter = mixed_ranks(llama)
    jcl.save_adapter(adapter, tmp_path / "o", base=llama, profile=profile, dtype=dtype)
    found = READERS[profile](tmp_path / "o", HEADS)
    assert len(found) == len(adapter.modules)
    for name, factors in adapter.modules.items():
        size = abs(factors.scale) * np.abs(factors.b) @ np.abs(factors.a)
        error = np.abs(delta(found[in_profile(name, profile)]) - delta(factors))
        assert (error <= 3 * EPS[dtype] * size).all()


@dataclasses.dataclass
class House:
    """Make a base as a folder and as GGUF, an adapter, and the log-probabilities of both by torch."""

    base: jcl.BaseModel
    packed: object
    adapter: Adapter
    wanted: np.ndarray
    effect: float


@pytest.fixture(scope="module", params=full_except(FAMILIES, ["llama", "gemma2", "phi3"]))
def house(request, tmp_path_factory):
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    # MLX's Gemma 3 requires a sixth layer, and rounds its scale, the root of the width, to bfloat16.
    model = tiny_model(family, **({"num_hidden_layers": 6, "hidden_size": 64} if family == "gemma3_text" else {}))
    model.save_pretrained(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    if family == "qwen2":  # MLX reads the key of transformers 4 and has another default.
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        (folder / "base" / "config.json").write_text(json.dumps(config))
    arch, tied = ARCHITECTURES[family], model.config.tie_word_embeddings
    tensors = {
        gguf_name(name, arch): (converted(name, tensor.numpy(), arch, HEADS), None)
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    words = "llama", [f"w{index}" for index in range(VOCAB)], [1] * VOCAB
    packed = write_gguf(folder / "base.gguf", arch, metadata_of(model.config, arch), tensors, words)
    base = jcl.open_base(folder / "base")
    adapter = mixed_ranks(base)
    before = predictions(model)
    state = model.state_dict()
    for name, factors in fuse(adapter.modules, base.fused).items():
        state[f"{name}.weight"] += torch.from_numpy(delta(factors)).float()
    after = predictions(model)
    return House(base, packed, adapter, after, np.abs(after - before).max())


def predictions(model) -> np.ndarray:
    with torch.no_grad():
        return log_softmax(model(torch.tensor([TOKENS])).logits[0, -1].numpy())


def test_llama_cpp_predicts_the_same(house, tmp_path):
    jcl.save_adapter(house.adapter, tmp_path / "o", base=house.base, profile="gguf")
    found = llama_cpp_log_probs(house.packed, tmp_path / "o" / "adapter.gguf", TOKENS, VOCAB)
    assert house.effect > 0.5
    np.testing.assert_allclose(found, house.wanted, atol=LLAMA_CPP.get(house.base.family.name, 1e-4))


@pytest.mark.parametrize("house", ["llama"], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_llama_cpp_reads_half_precision(house, tmp_path, dtype):
    jcl.save_adapter(house.adapter, tmp_path / "o", base=house.base, profile="gguf", dtype=dtype)
    found = llama_cpp_log_probs(house.packed, tmp_path / "o" / "adapter.gguf", TOKENS, VOCAB)
    assert np.abs(found - house.wanted).max() < 0.05 < house.effect


def test_mlx_predicts_the_same(house, tmp_path):
    jcl.save_adapter(house.adapter, tmp_path / "o", base=house.base, profile="mlx")
    found = mlx_log_probs(house.base.path, tmp_path / "o", TOKENS)
    np.testing.assert_allclose(found, house.wanted, atol=1e-4)


@pytest.mark.parametrize("house", ["phi3"], indirect=True)
def test_fused_modules_are_written_as_one(house, tmp_path):
    out = jcl.save_adapter(house.adapter, tmp_path / "o", base=house.base, profile="gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(out / "adapter.gguf").tensors}
    assert {"blk.0.attn_qkv.weight.lora_a", "blk.1.ffn_up.weight.lora_b"} <= names
    assert not any("attn_q." in name or "ffn_gate" in name for name in names)


def test_gguf_names_its_base_and_provenance(llama, tmp_path):
    out = jcl.save_adapter(random_adapter(llama), tmp_path / "o", base=llama, base_name="org/name", profile="gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(out / "adapter.gguf").fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.base_model.0.name"] == "org/name"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/org/name"


def test_the_same_input_gives_the_same_file(llama, tmp_path):
    for profile, file in (("gguf", "adapter.gguf"), ("mlx", "adapters.safetensors")):
        one, two = (
            jcl.save_adapter(random_adapter(llama), tmp_path / f"{profile}{place}", base=llama, profile=profile) / file
            for place in "ab"
        )
        assert one.read_bytes() == two.read_bytes()


def test_a_full_disk_leaves_no_gguf_and_no_open_file(llama, tmp_path, monkeypatch):
    used = []

    def full(writer, **_):
        used.append(writer)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OutputError, match="No space left"):
        jcl.save_adapter(random_adapter(llama), tmp_path / "o", base=llama, profile="gguf")
    assert [writer.fout for writer in used] == [None]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_checkpoint_and_logs_nothing(llama, tmp_path, monkeypatch, caplog):
    fill_disk(monkeypatch)
    with pytest.raises(OutputError, match=r"o: cannot be written \(No space left on device\): make it writable"):
        jcl.save_adapter(random_adapter(llama), tmp_path / "o", base=llama, profile="tunix")
    assert not caplog.records
    assert list(tmp_path.iterdir()) == []


def test_modules_that_a_profile_cannot_hold_are_refused_before_writing(llama, tmp_path, monkeypatch):
    adapter = random_adapter(llama)
    with pytest.raises(OutputError, match="--base"):
        jcl.save_adapter(adapter, tmp_path / "o", profile="gguf")
    with pytest.raises(UsageError, match="profile is 'best'; expected 'portable', 'peft', 'mlx', 'gguf'"):
        jcl.save_adapter(adapter, tmp_path / "o", profile="best")
    odd = Adapter({"transformer.h.0.attn": next(iter(adapter.modules.values()))})
    with pytest.raises(OutputError, match="another profile"):
        jcl.save_adapter(odd, tmp_path / "o", profile="mlx")
    with pytest.raises(AdapterError, match=r"transformer\.h\.0\.attn the first, that the base"):
        jcl.save_adapter(odd, tmp_path / "o", base=llama, profile="gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(OutputError, match="pip install"):
        jcl.save_adapter(adapter, tmp_path / "o", base=llama, profile="gguf")
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_every_profile_are_overwritten_on_request(llama, tmp_path):
    for profile in (*READERS, "portable"):
        jcl.save_adapter(random_adapter(llama), tmp_path / "o", base=llama, profile=profile, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
