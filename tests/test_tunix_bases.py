"""Models of tunix as bases, from Orbax and alive, against the logits of tunix and of what qwix makes of them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command_line import main
from decoder_pairs import run
from flax import nnx
from full_set import full_except
from tiny_bases import delta, llama_config, random_adapter
from tiny_tokenizers import KINDS
from tunix_models import (
    ALPHA,
    BASES,
    FIXTURES,
    TOKENS,
    quantised,
    save_model,
    tunix_logits,
    tunix_model,
    with_lora,
    write_base,
)

import jcrosslora as jcl
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import load_model
from jcrosslora.errors import CheckpointError

STORED = {"llama": "F32", "gemma3": "INT4"}
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
Q = "model.layers.0.self_attn.q_proj"
SIZES = {"num_layers": 2, "num_embed": 32, "embed_dim": 16, "hidden_dim": 24, "num_heads": 2, "head_dim": 8}


def stored(name, folder):
    """A checkpoint of a whole model that tunix wrote, with the model's config.json."""
    shutil.copytree(FIXTURES / name / "model", folder)
    shutil.copy(FIXTURES / name / "base" / "config.json", folder)
    return folder


def config_of(name):
    return json.loads((FIXTURES / name / "base" / "config.json").read_text())


def logits(base):
    return run(load_model(base), TOKENS)


@pytest.mark.parametrize("name", STORED)
def test_a_checkpoint_of_tunix_predicts_as_tunix_does(name, tmp_path):
    run_folder = stored(name, tmp_path / "run")
    base = jcl.open_base(run_folder)
    want = np.load(FIXTURES / name / "model_logits.npy")
    np.testing.assert_allclose(logits(base), want, **TOLERANCE)
    assert base.modules[Q].dtype == STORED[name]
    item = run_folder / "7" / "model_params"
    for folder in (item.parent, item):
        shutil.copy(run_folder / "config.json", folder)
        assert jcl.open_base(folder).digest() == base.digest()
    ids = np.array([5, 0, 5])
    np.testing.assert_array_equal(base.rows(f"{Q}.weight", ids), base.tensor(f"{Q}.weight")[ids])


@pytest.mark.filterwarnings("ignore")  # of tunix and what it imports
@pytest.mark.parametrize("name", full_except(BASES, ["llama", "qwen2", "gemma3-keys"]))
def test_live_models_and_their_checkpoints_predict_as_tunix_does(name, tmp_path):
    pytest.importorskip("tunix")
    folder = write_base(name, tmp_path / "base")
    model = tunix_model(name, folder)
    want = tunix_logits(model)
    config = json.loads((folder / "config.json").read_text()) if name == "llama" else None
    with_adapter = with_lora(tunix_model(name, folder), seed=4)
    with_adapter.set_attributes(qwix_rngs=nnx.Rngs(dropout=0))
    checkpoint = save_model(with_adapter, tmp_path / "run")
    shutil.copy(folder / "config.json", checkpoint)
    state = nnx.state(model)
    given = [(model, config), (with_adapter, config), (state, config or model.config), (checkpoint, None)]
    bases = [jcl.open_base(one, config=stated) for one, stated in given]
    for base in bases:
        np.testing.assert_allclose(logits(base), want, **TOLERANCE)
    assert len({base.digest() for base in bases[:3]}) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", full_except(["gemma", "gemma2", "gemma3"], ["gemma", "gemma3"]))
def test_the_model_config_of_tunix_is_translated(case):
    pytest.importorskip("tunix")
    from tunix.models.gemma import model as gemma
    from tunix.models.gemma3 import model as gemma3

    if case == "gemma3":
        norm = gemma3.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
        changes = {"num_layers": 7, "embed_dim": 32, "global_scale_factor": 8.0, "query_pre_attn_norm": norm}
        model = gemma3.Gemma3(
            gemma3.ModelConfig(**SIZES | changes, num_kv_heads=1, sliding_window_size=3), rngs=nnx.Rngs(0)
        )
    else:
        new, kinds = case == "gemma2", gemma.AttentionType
        config = gemma.ModelConfig(
            **SIZES,
            num_kv_heads=1 + new,
            attention_types=(kinds.LOCAL_SLIDING if new else kinds.GLOBAL, kinds.GLOBAL),
            use_post_attn_norm=new,
            use_post_ffw_norm=new,
            final_logit_softcap=20.0 if new else None,
            attn_logits_soft_cap=10.0 if new else None,
            sliding_window_size=3 if new else None,
        )
        model = gemma.Gemma(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    nnx.update(model, jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), nnx.state(model)))
    base = jcl.open_base(model)
    assert base.family.name.removesuffix("_text") == case
    np.testing.assert_allclose(logits(base), tunix_logits(model), **TOLERANCE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("qtype", "options", "stated"),
    [
        ("int8", {}, "INT8"),
        ("int8", {"tile": 8, "calibration": "minmax"}, "INT8"),
        ("nf4", {"tile": 8}, "NF4"),
        ("float8_e4m3fn", {}, "F8_E4M3"),
    ],
)
def test_what_qwix_quantised_is_dequantised(qtype, options, stated, tmp_path):
    pytest.importorskip("tunix")
    model = quantised(tunix_model("gemma3", write_base("gemma3", tmp_path)), qtype, **options)
    base = jcl.open_base(model)
    assert base.modules[Q].dtype == stated
    np.testing.assert_allclose(logits(base), tunix_logits(model), **TOLERANCE)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_moves_between_live_models_without_a_file(tmp_path):
    pytest.importorskip("tunix")
    source, target = (tunix_model("gemma3", write_base("gemma3", tmp_path / part)) for part in "ab")
    trained = with_lora(source, seed=5)
    adapter = jcl.load_adapter(nnx.state(trained, nnx.LoRAParam), alpha=ALPHA)
    result = jcl.transfer(adapter, trained, target, "cross-lora", cache=False)
    taken = with_lora(target, rank=8, alpha=8.0)
    jcl.to_nnx(result.adapter, taken, alpha=8.0)
    found = jcl.load_adapter(nnx.state(taken, nnx.LoRAParam), alpha=8.0)
    for module, item in result.adapter.modules.items():
        np.testing.assert_allclose(delta(found.modules[module]), delta(item), atol=1e-5)


def test_a_transfer_between_checkpoints_is_that_between_the_same_weights(tmp_path):
    folders = [stored(name, tmp_path / name) for name in STORED]
    (tmp_path / "llama" / "lora_config.json").write_text('{"alpha": 6.0}')
    out = ["--target", str(folders[1]), "--method", "cross-lora", "--out", str(tmp_path / "out")]
    main(["transfer", str(folders[0]), "--source", str(folders[0]), *out])
    opened = [jcl.open_base(folder) for folder in folders]
    named = [
        jcl.open_base({name: base.tensor(name) for name in base.store.names()}, config=config_of(name))
        for name, base in zip(STORED, opened, strict=True)
    ]
    adapter = jcl.load_adapter(FIXTURES / "llama" / "lora", alpha=ALPHA)
    want = jcl.transfer(adapter, *named, "cross-lora", cache=False)
    found = jcl.load_adapter(tmp_path / "out")
    assert found.modules.keys() == want.adapter.modules.keys()
    for module, item in want.adapter.modules.items():
        np.testing.assert_allclose(delta(found.modules[module]), delta(item), atol=1e-5)


def test_text_is_read_by_the_tokenizer_in_the_folder(tmp_path):
    folder = stored("gemma3", tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        load_tokenizer(jcl.open_base(folder))
    made = KINDS["byte-level"]()
    made.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(jcl.open_base(folder)).backend.get_vocab() == made.get_vocab()


def test_inspect_tells_models_and_lora_apart(tmp_path, capsys):
    main(["inspect", str(stored("gemma3", tmp_path / "gemma3"))])
    assert "base model:" in capsys.readouterr().out
    main(["inspect", str(stored("llama", tmp_path / "llama")), "--alpha", "6"])
    assert "format of Orbax" in capsys.readouterr().out


def test_merge_writes_the_model_for_others(tmp_path):
    folder = stored("llama", tmp_path / "run")
    base = jcl.open_base(folder)
    adapter = random_adapter(base, rank=2)
    jcl.save_adapter(adapter, tmp_path / "adapter", base=base)
    main(["merge", str(folder), str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    merged = jcl.open_base(tmp_path / "merged")
    np.testing.assert_allclose(merged.weight(Q), base.weight(Q) + delta(adapter.modules[Q]), atol=1e-5)


def changed(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_a_checkpoint_lacks_is_named(tmp_path):
    folder = stored("llama", tmp_path / "run")
    changed(folder, intermediate_size=32)
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight has shape \[24, 16\], config says \[32, 16\].*belongs"
    ):
        jcl.open_base(folder)
    (folder / "config.json").write_text(json.dumps(llama_config() | {"model_type": "mistral", "architectures": None}))
    with pytest.raises(CheckpointError, match=r"tunix has a class for llama, .* is of mistral"):
        jcl.open_base(folder)
    shutil.copy(FIXTURES / "gemma3" / "base" / "config.json", folder)
    with pytest.raises(CheckpointError, match=r"parameter 'final_norm.w|parameter 'layers.* not known for gemma3_text"):
        jcl.open_base(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"without config.json.*hf download"):
        jcl.open_base(folder)
    lora = shutil.copytree(FIXTURES / "llama" / "lora", tmp_path / "lora")
    shutil.copy(FIXTURES / "llama" / "base" / "config.json", lora)
    with pytest.raises(CheckpointError, match=r"holds LoRA alone"):
        jcl.open_base(lora)


def tree(*, form="w", value=None, name="layers.0.attn.q_proj"):
    """The embedding of a Llama and another parameter, as a state of nested mappings."""
    found = {"embedder": {"input_embedding": np.ones((32, 16))}}
    place = found
    for key in name.split("."):
        place = place.setdefault(key, {})
    place[form] = np.ones((16, 2, 8)) if value is None else value
    return found


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (tree(name="layers.0.mlp.router", form="kernel"), r"'layers.0.mlp.router.kernel' is not known for llama"),
        (tree(value=np.ones((16, 16))), r"q_proj.w' has shape \[16, 16\], which is not that of tunix"),
        (tree(value={"array": {"qvalue": np.ones((16, 2, 8), np.int8)}}), r"q_proj.w' .* consists of qvalue: give"),
        (tree(value={"array": {"qvalue": np.ones((16, 2, 8), np.int16), "scale": np.ones((1, 1, 1))}}), r"dtype int16"),
        (tree(value=np.ones((16, 2, 8), "datetime64[s]")), r"dtype datetime64\[s\], which is not supported"),
    ],
)
def test_other_parameters_are_refused_by_name(state, message):
    with pytest.raises(CheckpointError, match=message):
        jcl.open_base(state, config=config_of("llama"))


def test_a_scale_that_does_not_fit_is_refused(tmp_path):
    base = jcl.open_base(stored("gemma3", tmp_path / "run"))
    arrays = ocp.StandardCheckpointer().restore(tmp_path / "run" / "7" / "model_params")
    part = arrays["layers"]["0"]["attn"]["q_einsum"]["w"]["array"]["scale"]
    part["value"] = jnp.ones((2, 3, 8))
    damaged = jcl.open_base(arrays, config=config_of("gemma3"))
    name = f"{Q}.weight"
    assert damaged.tensor(name.replace("0", "1", 1)).shape == base.tensor(name).shape
    with pytest.raises(CheckpointError, match=r"q_einsum.w' does not fit its numbers: shape \[2, 3, 8\]"):
        damaged.tensor(name)


@pytest.mark.filterwarnings("ignore")
def test_llama_needs_a_configuration(tmp_path):
    pytest.importorskip("tunix")
    model = tunix_model("llama", write_base("llama", tmp_path))
    with pytest.raises(CheckpointError, match=r"llama3 does not state how positions are scaled: give config="):
        jcl.open_base(model)
