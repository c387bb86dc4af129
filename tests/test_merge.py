"""Merged checkpoints: torch's own sum is the oracle, and unchanged tensors keep every bit."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import llama_tensors, write_config, write_safetensors, write_sharded_llama
from gguf_files import gguf, small_llama
from gguf_forms import SPARSE_FORMS, write_form
from probe_bases import write_base
from safetensors import safe_open
from tiny_bases import delta, random_adapter
from tiny_models import FAMILIES, save_tiny, tiny_model, torch, transformers

import jcrosslora as jcl
from jcrosslora import MergeSettings, merge
from jcrosslora.adapter import Adapter, save_adapter
from jcrosslora.adapter.merge import write_companions
from jcrosslora.checkpoint import safetensors
from jcrosslora.checkpoint.safetensors import ShardedStore
from jcrosslora.checkpoint.store import FileNames
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.cli.main import main
from jcrosslora.errors import AdapterError, CheckpointError, OutputError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.tensor([[5, 9, 30, 7, 61, 44, 12]])


def saved_adapter(base, out: Path, **kwargs) -> tuple[Adapter, Path]:
    """Make an adapter without a third of the modules, with a scale other than 1."""
    whole = random_adapter(base, rank=3, scale=0.02, **kwargs)
    adapter = Adapter({name: factors for place, (name, factors) in enumerate(whole.modules.items()) if place % 3})
    return adapter, jcl.save_adapter(adapter, out, base=base)


def merged(base: Path, adapter: Path, out: Path, **changes) -> jcl.BaseModel:
    merge(MergeSettings(str(base), str(adapter), str(out), **changes))
    return jcl.open_base(out)


def stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Read dtype and bytes of every tensor of every file by safetensors' own reader."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                tensor = file.get_tensor(name)
                found[name] = str(tensor.dtype), tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_merged_model_equals_that_of_peft_in_transformers(tmp_path, family):
    base = jcl.open_base(save_tiny(family, tmp_path / "base"))
    adapter, folder = saved_adapter(base, tmp_path / "adapter")
    again = merged(base.path, folder, tmp_path / "out")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), str(folder)).merge_and_unload()
    with torch.no_grad():
        wanted, plain = theirs(TOKENS).logits, tiny_model(family)(TOKENS).logits
        torch.testing.assert_close(ours(TOKENS).logits, wanted, atol=1e-4, rtol=1e-5)
    assert (wanted - plain).abs().max() > 0.1
    for name, tensor in theirs.state_dict().items():
        if not (name == "lm_head.weight" and theirs.config.tie_word_embeddings):
            np.testing.assert_allclose(again.tensor(name), tensor.numpy(), atol=1e-6)
    changed = {base.modules[name].tensor for name in adapter.modules}
    before, after = stored(base.path), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == changed


def test_shards_keep_their_names_and_every_tensor_its_dtype(tmp_path):
    base = jcl.open_base(write_sharded_llama(tmp_path / "base"))
    adapter, folder = saved_adapter(base, tmp_path / "adapter")
    tensors = llama_tensors()
    kinds = {name: "BF16" if ".mlp." in name else "F16" if ".self_attn." in name else "F32" for name in tensors}
    types = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in set(index.values()):
        held = {
            name: (kinds[name], tensors[name].astype(types[kinds[name]])) for name in tensors if index[name] == shard
        }
        write_safetensors(tmp_path / "base" / shard, held)
    (tmp_path / "base" / "consolidated.safetensors").write_bytes(b"another checkpoint")
    again = merged(tmp_path / "base", folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"] == index
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    base = jcl.open_base(tmp_path / "base")
    for name, module in base.modules.items():
        found, kept = again.weight(name), base.weight(name)
        assert found.dtype == kept.dtype == types[kinds[module.tensor]]
        change = delta(adapter.modules[name]) if name in adapter.modules else 0
        wanted = (kept.astype(np.float32) + np.asarray(change, np.float32)).astype(kept.dtype)
        # Rounded once: a float32 value near a tie may round to the other side.
        assert np.mean(found != wanted) < 0.02
        np.testing.assert_allclose(found.astype(np.float64), wanted.astype(np.float64), rtol=2**-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_is_set_in_files_and_configuration(tmp_path, dtype):
    base = jcl.open_base(save_tiny("llama", tmp_path / "base"))
    _, folder = saved_adapter(base, tmp_path / "adapter")
    merged(base.path, folder, tmp_path / "out", dtype=dtype)
    assert {kind for kind, _ in stored(tmp_path / "out").values()} == {f"torch.{dtype}"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"


def test_weights_beyond_a_dtype_are_refused(tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e6
    write_config(tmp_path / "base")
    write_safetensors(tmp_path / "base" / "model.safetensors", {name: ("F32", each) for name, each in tensors.items()})
    base = jcl.open_base(tmp_path / "base")
    _, folder = saved_adapter(base, tmp_path / "adapter")
    with pytest.raises(OutputError, match="do not fit float16"):
        merged(base.path, folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_and_other_files_are_copied_without_weights_and_card(tmp_path):
    write_base(tmp_path / "base", merges=8, layers=1)
    for name in ("generation_config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE"):
        (tmp_path / "base" / name).write_text(f"{{}} {name}")
    for name in ("README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", ".hidden.json"):
        (tmp_path / "base" / name).write_text("no")
    _, folder = saved_adapter(jcl.open_base(tmp_path / "base"), tmp_path / "adapter")
    merged(tmp_path / "base", folder, tmp_path / "out")
    came = {path.name for path in (tmp_path / "out").iterdir()}
    assert came == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt"),
        *("chat_template.jinja", "LICENSE", "model.safetensors", "merge_report.json"),
    }
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (tmp_path / "base" / "config.json").read_text()
    )


def test_configurations_are_copied_without_paths(tmp_path):
    write_base(tmp_path / "base", merges=8, layers=1)
    mine = "/home/ann/secret/model"
    stated = {
        "tokenizer_config.json": {"name_or_path": "org/model", "special_tokens_map_file": f"{mine}/map.json", "n": 1},
        "trainer_state.json": {"best_model_checkpoint": "./secret/runs/best", "log_history": [{"loss": 0.5}]},
        "generation_config.json": {
            "_name_or_path": "",
            "of": [{"_name_or_path": mine}],
            "chat_template": "{{ a }}/{{ b }}: the drive at '/mnt/data', /v1/chat/completions",
        },
    }
    for name, values in stated.items():
        (tmp_path / "base" / name).write_text(json.dumps(values))
    tokens = tmp_path / "base" / "tokenizer.json"
    tokens.write_text(json.dumps(json.loads(tokens.read_text()) | {"token": mine}))
    folder = tmp_path / "out"
    folder.mkdir()
    write_companions(jcl.open_base(tmp_path / "base"), folder, "keep", as_stored=True)
    found = {name: json.loads((folder / name).read_text()) for name in stated}
    assert found == {
        "tokenizer_config.json": {"name_or_path": "org/model", "special_tokens_map_file": "map.json", "n": 1},
        "trainer_state.json": {"best_model_checkpoint": "best", "log_history": [{"loss": 0.5}]},
        "generation_config.json": {
            "_name_or_path": "",
            "of": [{"_name_or_path": "model"}],
            "chat_template": "{{ a }}/{{ b }}: the drive at '/mnt/data', /v1/chat/completions",
        },
    }
    assert (folder / "tokenizer.json").read_bytes() == tokens.read_bytes()


def test_a_merge_has_the_chat_template_of_the_adapter(tmp_path):
    base, template = jcl.open_base(write_base(tmp_path / "base", merges=8, layers=1)), "{{ messages[0]['content'] }}"
    (base.path / "chat_template.jinja").write_text("{{ bos_token }}")
    adapter, plain = saved_adapter(base, tmp_path / "plain")
    save_adapter(adapter, tmp_path / "own", documents={"chat_template.jinja": template})
    for folder, wanted in ((plain, "{{ bos_token }}"), (tmp_path / "own", template)):
        out = merge(MergeSettings(str(base.path), str(folder), str(tmp_path / f"out-{folder.name}")))
        assert load_tokenizer(jcl.open_base(out.folder)).chat_template == wanted
        assert any("that of the adapter" in note for note in out.notes) == (wanted == template)


def test_missing_files_of_a_hub_model_are_downloaded(tmp_path, monkeypatch):
    write_base(tmp_path / "base", merges=0, layers=1)
    base = dataclasses.replace(jcl.open_base(tmp_path / "base"), ref="org/name", revision="c0ffee")

    def fetch(hub_id: str, revision: str) -> None:
        (base.path / "tokenizer.model").write_text(f"{hub_id} {revision}")

    monkeypatch.setattr("jcrosslora.adapter.merge.fetch_companions", fetch)
    (tmp_path / "out").mkdir()
    write_companions(base, tmp_path / "out", "keep", as_stored=True)
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "org/name c0ffee"


def test_tensors_outside_the_text_model_are_kept(tmp_path):
    text = {f"language_model.{name}": ("F32", tensor) for name, tensor in llama_tensors().items()}
    tower = np.arange(6, dtype=np.int32).reshape(2, 3)
    folder = tmp_path / "multi"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", text | {"vision.tower": ("I32", tower)})
    store = ShardedStore(folder, FileNames({"language_model.": ""}))
    ((shard, _, names),) = store.stored()
    assert shard == "model.safetensors"
    assert names.pop("vision.tower") is None
    assert names == {f"language_model.{name}": name for name in llama_tensors()}


@pytest.mark.parametrize("kind", [None, "Q8_0"])
def test_a_gguf_base_becomes_a_folder(tmp_path, kind):
    quantised = None if kind is None else gguf.GGMLQuantizationType[kind]
    path, _ = small_llama(tmp_path / "base.gguf", kind=quantised)
    base = jcl.open_base(path)
    adapter, folder = saved_adapter(base, tmp_path / "adapter")
    done = merge(MergeSettings(str(path), str(folder), str(tmp_path / "out"), dtype="float32"))
    assert any("no tokenizer was written" in note for note in done.notes)
    again = jcl.open_base(tmp_path / "out")
    assert again.dims == base.dims
    for name in base.store.names():
        wanted = np.array(base.tensor(name), np.float32)
        module = name.removesuffix(".weight")
        if module in adapter.modules:
            wanted += delta(adapter.modules[module]).astype(np.float32)
        np.testing.assert_allclose(again.tensor(name), wanted, atol=1e-6)
    merge(MergeSettings(str(path), str(folder), str(tmp_path / "keep")))
    kept = {kind for name, (kind, _) in stored(tmp_path / "keep").items() if "proj" in name}
    assert kept == {"torch.float32" if kind is None else "torch.bfloat16"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(model.dtype) == "torch.float32"


def test_experts_of_a_gguf_file_are_not_written_under_names_that_no_class_has(tmp_path):
    _, path = write_form(tmp_path / "base.gguf", SPARSE_FORMS["qwen3_moe"])
    _, folder = saved_adapter(jcl.open_base(path), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"not stored as transformers loads them.*merge into the unquantised"):
        merge(MergeSettings(str(path), str(folder), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_a_gguf_file_is_written(tmp_path):
    words = ["<s>", "</s>", "a", "b", "c", "ab", "abc", "\u0120", "\u0120a", "d"]
    metadata = {
        "tokenizer.ggml.pre": "llama-bpe",  # of Llama 3, which starts texts with bos
        "tokenizer.ggml.merges": ["a b", "ab c", "\u0120 a"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ bos_token }}",
    }
    path, _ = small_llama(tmp_path / "base.gguf", metadata, tokens=("gpt2", words, [3, 3, *[1] * 8]))
    _, folder = saved_adapter(jcl.open_base(path), tmp_path / "adapter")
    assert merge(MergeSettings(str(path), str(folder), str(tmp_path / "out"))).notes == ()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abc abd</s>")["input_ids"] == [0, 6, 7, 5, 9, 1]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.chat_template == "{{ bos_token }}"


@pytest.mark.parametrize("stated", [True, False])
def test_fp8_weights_are_dequantised(tmp_path, stated):
    tensors = {name: ("F32", array) for name, array in llama_tensors().items()}
    name = "model.layers.0.mlp.gate_proj.weight"
    values = tensors[name][1].astype(ml_dtypes.float8_e4m3fn)
    scales = {f"{name}_scale": ("F32", np.full((24, 1), 0.5, np.float32)), name: ("F8_E4M3", values)}
    write_config(tmp_path / "base", quantization_config={"quant_method": "fp8"} if stated else ...)
    write_safetensors(tmp_path / "base" / "model.safetensors", tensors | scales)
    base = jcl.open_base(tmp_path / "base")
    adapter, folder = saved_adapter(base, tmp_path / "adapter")
    again = merged(base.path, folder, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert f"{name}_scale" not in again.store.names()
    assert again.tensor(name).dtype == ml_dtypes.bfloat16
    change = adapter.modules.get(name.removesuffix(".weight"))
    wanted = 0.5 * values.astype(np.float32) + (0 if change is None else delta(change))
    np.testing.assert_allclose(again.tensor(name).astype(np.float32), wanted, rtol=2**-8)
    assert {again.tensor(other).dtype.name for other in tensors if other != name} == {"float32"}


def test_blocks_and_shards_do_not_change_the_values(tmp_path, monkeypatch):
    path, _ = small_llama(tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    _, folder = saved_adapter(jcl.open_base(path), tmp_path / "adapter")
    merge(MergeSettings(str(path), str(folder), str(tmp_path / "one"), dtype="float32"))
    monkeypatch.setattr("jcrosslora.adapter.merge._BLOCK", 7 * 64)
    monkeypatch.setattr("jcrosslora.adapter.merge._SHARD", 40_000)
    merge(MergeSettings(str(path), str(folder), str(tmp_path / "many"), dtype="float32"))
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = (jcl.open_base(tmp_path / name) for name in ("one", "many"))
    for name in one.store.names():
        np.testing.assert_allclose(one.tensor(name), many.tensor(name), atol=1e-6)


def test_a_failed_merge_writes_nothing_and_keeps_an_earlier_one(tmp_path, monkeypatch):
    base = jcl.open_base(write_sharded_llama(tmp_path / "base"))
    _, folder = saved_adapter(base, tmp_path / "adapter")
    settings = MergeSettings(str(base.path), str(folder), str(tmp_path / "out"))
    merge(settings)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OutputError, match="exists"):
        merge(settings)
    again = MergeSettings(*(str(path) for path in (base.path, folder, tmp_path / "out")), overwrite=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "_header", full)
        with pytest.raises(OutputError, match="No space left"):
            merge(again)
    with monkeypatch.context() as patch:
        patch.setattr("jcrosslora.adapter.merge.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(OutputError, match="GB free"):
            merge(again)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    merge(again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    with pytest.raises(OutputError, match="holds no"):
        merge(MergeSettings(str(base.path), str(folder), str(base.path), overwrite=True))


def test_the_command_reports_changes_that_are_not_merged(tmp_path, capsys):
    base = jcl.open_base(write_sharded_llama(tmp_path / "base"))
    adapter, folder = saved_adapter(base, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"novelty": 3}))
    main(["merge", str(base.path), str(folder), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert "not merged: config key novelty" in printed.out
    changed = f"{len(adapter.modules)} modules changed, without parts of the adapter, see above"
    assert printed.out.splitlines()[-1] == f"written: {tmp_path / 'out'} ({changed})"
    assert printed.err == ""  # a progress bar is shown on a terminal alone
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["base"]["ref"] == "base"
    assert report["adapter"]["digest"].startswith("sha256:")
    assert report["whole"] is False


def test_an_adapter_of_another_base_is_refused(tmp_path):
    write_sharded_llama(tmp_path / "base")
    other = jcl.open_base(write_base(tmp_path / "other", merges=0, layers=1))
    _, folder = saved_adapter(other, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="give the base it was trained on"):
        merged(tmp_path / "base", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
