"""Bases that a program already holds, against the same weights opened from a folder."""

import gc
import json

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_pairs import EACH_FAMILY, VARIANTS, random_tokens, run
from full_set import first_of_each
from quantised_files import CASES, format_of, write_quantised
from tiny_bases import llama_config, llama_tensors, write_llama, write_tokenizer
from tiny_models import save_tiny, tiny_model, torch, transformers
from tiny_tokenizers import KINDS

import jcrosslora as jcl
from jcrosslora.checkpoint import SafetensorsFile, load_tokenizer, open_base, shared_ids
from jcrosslora.decoder import load_model
from jcrosslora.errors import CheckpointError, UsageError
from jcrosslora.utils.digests import FileDigests

Q = "model.layers.0.self_attn.q_proj.weight"


def nested(flat):
    """Dots of the names as levels of dicts; the layers have integer keys, as in nnx."""
    tree = {}
    for name, array in flat.items():
        *path, last = (int(part) if part.isdecimal() else part for part in name.split("."))
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = array
    return tree


def as_jax(state):
    return {name: jnp.asarray(tensor.numpy()) for name, tensor in state.items()}


FORMS = {
    "live model": lambda model: ((model,), {}),
    "state_dict": lambda model: ((model.state_dict(),), {"config": model.config}),
    "numpy": lambda model: (
        ({name: tensor.numpy() for name, tensor in model.state_dict().items()},),
        {"config": model.config.to_dict()},
    ),
    "pytree": lambda model: ((nested(as_jax(model.state_dict())),), {"config": model.config}),
    "nnx.State": lambda model: (
        (nnx.State(nested({name: nnx.Param(array) for name, array in as_jax(model.state_dict()).items()})),),
        {"config": model.config},
    ),
}


@pytest.mark.parametrize("variant", EACH_FAMILY)
def test_every_form_gives_the_logits_of_the_folder(variant, tmp_path):
    family, overrides = VARIANTS[variant]
    model, tokens = tiny_model(family, **overrides), random_tokens(1, 20)
    stored = open_base(save_tiny(family, tmp_path, **overrides))
    wanted = run(load_model(stored), tokens)
    digests = set()
    for name, form in FORMS.items():
        arguments, keywords = form(model)
        base = open_base(*arguments, **keywords)
        assert np.array_equal(run(load_model(base), tokens), wanted), name
        assert set(base.store.names()) == set(stored.store.names())
        digests.add(base.digest())
    assert len(digests) == 1


def test_bfloat16_is_read_bit_by_bit(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored, base = open_base(tmp_path), open_base(model.state_dict(), config=model.config)
    for name in stored.store.names():
        assert base.store.dtype(name) == "BF16"
        assert np.array_equal(base.tensor(name).view(np.uint16), stored.tensor(name).view(np.uint16)), name
    ids = np.array([5, 0, 5])
    assert np.array_equal(base.rows(Q, ids), stored.rows(Q, ids))


def test_other_dtypes_of_torch_are_read():
    tensors = {name: torch.from_numpy(array).to(torch.float16) for name, array in llama_tensors().items()}
    tensors["extra"] = torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn)
    base = open_base(tensors, config=llama_config())
    assert base.modules[Q.removesuffix(".weight")].dtype == "F16"
    assert base.store.dtype("extra") == "F8_E4M3"
    assert base.tensor("extra").astype(np.float32).tolist() == [1.5, -2.0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_models_are_opened_without_their_adapters():
    import peft

    model = tiny_model("llama", tie_word_embeddings=False)
    plain = open_base({name: tensor.clone() for name, tensor in model.state_dict().items()}, config=model.config)
    config = peft.LoraConfig(
        target_modules=["q_proj", "gate_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3]
    )
    wrapped = peft.get_peft_model(model, config)
    base = open_base(wrapped)
    assert base.digest() == plain.digest()
    assert sorted(base.store.names()) == sorted(plain.store.names())
    wrapped.merge_adapter()
    with pytest.raises(CheckpointError, match=r"merged into the weights of .*: call unmerge_adapter"):
        open_base(wrapped)
    wrapped.unmerge_adapter()
    assert open_base(wrapped).dims == plain.dims


def test_multimodal_checkpoints_give_their_text_model():
    config = {"model_type": "gemma3", "text_config": tiny_model("gemma3_text").config.to_dict()}
    state = tiny_model("gemma3_text").state_dict()
    inner = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in state.items()}
    inner["model.vision_tower.weight"] = torch.zeros(2)
    base = open_base(inner, config=config)
    assert base.family.name == "gemma3_text"
    assert "model.vision_tower.weight" not in base.store.names()
    assert np.array_equal(base.tensor(Q), state[Q].numpy())


@pytest.mark.parametrize("case", first_of_each(CASES, format_of))
def test_quantised_tensors_are_dequantised_as_from_a_file(case, tmp_path):
    write_quantised(tmp_path, CASES[case])
    stored, file = open_base(tmp_path), SafetensorsFile(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    base = open_base({name: file.array(name) for name in file.entries}, config=config)
    for name, module in stored.modules.items():
        assert base.modules[name] == module
        assert np.array_equal(base.weight(name), stored.weight(name))


def test_the_digest_follows_from_the_content():
    tensors, config = llama_tensors(), llama_config()
    first = open_base(tensors, config=config).digest()
    assert first.startswith("sha256:")
    reordered = {name: torch.from_numpy(tensors[name].copy()) for name in sorted(tensors, reverse=True)}
    assert open_base(reordered, config=config).digest() == first
    changed = {**tensors, Q: tensors[Q].copy()}
    changed[Q][3, 4] += 1e-6
    assert open_base(changed, config=config).digest() != first


def test_records_of_file_digests_leave_weights_in_memory_alone(tmp_path):
    config, digests = llama_config(), FileDigests(tmp_path)
    bases = [open_base(llama_tensors(seed=seed), config=config) for seed in (0, 0, 1)]
    one, same, other = (base.digest(digests) for base in bases)
    assert one == same != other
    assert not list(tmp_path.iterdir())


def test_arrays_are_views_that_cannot_be_written():
    tensors = llama_tensors()
    base = open_base(tensors, config=llama_config())
    assert np.shares_memory(base.tensor(Q), tensors[Q])
    assert not base.tensor(Q).flags.writeable
    assert tensors[Q].flags.writeable
    base.release()


def test_names():
    tensors, config = llama_tensors(), llama_config()
    assert open_base(tensors, config=config).name == "base in memory"
    assert open_base(tensors, config=config, name="me/mine").name == "me/mine"
    model = tiny_model("llama")
    model.config._name_or_path = "org/model"
    assert open_base(model).name == "org/model"
    model.config._name_or_path = "/home/someone/model"
    assert open_base(model).name == "base in memory"


def test_an_open_base_is_returned_as_it_is(tmp_path):
    base = open_base(write_llama(tmp_path))
    assert open_base(base) is base
    assert open_base(base, name="me/mine").name == "me/mine"
    with pytest.raises(UsageError, match="config and tokenizer can be given with a base that is not open yet only"):
        open_base(base, config={}, tokenizer="x")


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_are_taken_from_paths_and_objects(kind, tmp_path):
    made = KINDS[kind]()
    made.save(str(tmp_path / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    tensors, config = llama_tensors(vocab=320), llama_config(vocab=320)
    given = {"folder": tmp_path, "file": str(tmp_path / "tokenizer.json"), "tokenizers": made, "transformers": fast}
    bases = {name: open_base(tensors, config=config, tokenizer=tokenizer) for name, tokenizer in given.items()}
    text = "Answer: the sun"
    wanted = load_tokenizer(bases["folder"]).encode(text)
    for base in bases.values():
        assert np.array_equal(load_tokenizer(base).encode(text).ids, wanted.ids)
        assert base.vocabulary().tokens == bases["folder"].vocabulary().tokens
    assert made.token_to_id("</s>") in load_tokenizer(bases["transformers"]).stops


@pytest.mark.full
def test_the_folder_of_a_tokenizer_object_goes_with_the_base():
    base = open_base(llama_tensors(vocab=320), config=llama_config(vocab=320), tokenizer=KINDS["byte-level"]())
    renamed = open_base(base, name="me/mine")
    folder = base.tokenizer_path
    del base
    gc.collect()
    assert renamed.tokenizer_path == folder
    assert (folder / "tokenizer.json").exists()
    del renamed
    gc.collect()
    assert not folder.exists()


def test_a_base_without_a_tokenizer_says_so_where_text_is_needed(tmp_path):
    write_tokenizer(tmp_path, 96)
    base, told = (
        open_base(llama_tensors(), config=llama_config(), tokenizer=given, name="mine") for given in (None, tmp_path)
    )
    assert base.vocabulary().reason == "no tokenizer was given"
    assert shared_ids(told, base) == (None, "mine: no tokenizer was given")
    with pytest.raises(CheckpointError, match=r"mine: no tokenizer was given.*tokenizer=\.\.\."):
        load_tokenizer(base)


def test_align_takes_bases_in_memory(tmp_path):
    source, target = (write_llama(tmp_path / name, seed=seed) for seed, name in enumerate(("source", "target")))
    held = [
        open_base(llama_tensors(seed=seed), config=llama_config(), tokenizer=folder)
        for seed, folder in enumerate((source, target))
    ]
    transports = [jcl.align(*pair, method="cross-lora") for pair in ((open_base(source), open_base(target)), held)]
    for stored, in_memory in zip(*map(jax.tree.leaves, transports), strict=True):
        assert np.array_equal(stored, in_memory, equal_nan=True)
    assert transports[1].source.digest == held[0].digest()


WRONG = {
    "missing tensor": (lambda t: t.pop(Q), r"q_proj.weight is missing: give Hugging Face names"),
    "transposed": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T}),
        r"up_proj.weight has shape \[48, 80\], config says \[80, 48\]: give Hugging Face names and weights of "
        r"shape \(out, in\)",
    ),
    "other names": (
        lambda t: [t.update({name.replace("model.", "net."): t.pop(name)}) for name in list(t)],
        r"no tensor is named model\.layers\.\*: give Hugging Face names",
    ),
    "no array": (
        lambda t: t.update({Q: "text"}),
        r"q_proj.weight' is of type str, expected a numpy, jax or torch array",
    ),
    "meta device": (lambda t: t.update({Q: torch.empty(48, 48, device="meta")}), "meta device and holds no data"),
    "strange dtype": (lambda t: t.update({Q: np.zeros((48, 48), object)}), "has dtype object, which is not supported"),
    "name twice": (lambda t: t.update({"model": {"norm": {"weight": np.ones(48)}}}), "two tensors have one name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_weights_are_refused(case):
    change, message = WRONG[case]
    tensors = llama_tensors()
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        open_base(tensors, config=llama_config())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "config is missing, expected the content of config.json"),
        ({"config": "config.json"}, "config is of type str, expected"),
        ({"config": {**llama_config(), "model_type": "gpt9"}}, "base in memory: model_type 'gpt9' is not supported"),
        ({"config": {**llama_config(), "hidden_size": "48"}}, "base in memory: config key 'hidden_size' is '48'"),
        (
            {"config": llama_config(), "tokenizer": 3},
            "tokenizer is of type int, expected a folder, a tokenizer.json",
        ),
        ({"config": llama_config(), "tokenizer": "nowhere"}, "nowhere is neither a tokenizer.json nor a folder"),
        (
            {"config": {**llama_config(), "quantization_config": {"quant_method": "other"}}},
            "base in memory: weights quantised with 'other' are not supported",
        ),
    ],
)
def test_wrong_configs_and_tokenizers_are_refused(arguments, message):
    with pytest.raises(CheckpointError, match=message):
        open_base(llama_tensors(), **arguments)


def test_arguments_that_do_not_apply_are_refused(tmp_path):
    with pytest.raises(UsageError, match="revision can be given with a hub id only"):
        open_base(llama_tensors(), config=llama_config(), revision="main")
    with pytest.raises(UsageError, match="config can be given with weights in memory only"):
        open_base(write_llama(tmp_path), config=llama_config())
    with pytest.raises(UsageError, match="config can be given with weights without a configuration only"):
        open_base(tiny_model("llama"), config=llama_config())
    with pytest.raises(CheckpointError, match="a base of type int cannot be opened"):
        open_base(3)


def test_a_base_is_shown_in_a_line_and_as_a_table(tmp_path):
    base = open_base(llama_tensors(), config=llama_config(), name="<me>/mine")
    assert repr(base) == "BaseModel('<me>/mine', llama, 3 layers, width 48, 60,240 parameters, F32)"
    html = base._repr_html_()
    assert "&lt;me&gt;/mine" in html
    assert "60,240" in html
    assert "revision" not in html


def test_a_live_model_that_was_read_from_gguf_opens():
    model = tiny_model("llama")
    plain = open_base(model)
    quantised = {"quant_method": "gguf", "gguf_file": "model.gguf", "dequantize": False}
    model.config.update({"_model_name_or_path": "Tiny Llama", "quantization_config": quantised})
    assert open_base(model).digest() == plain.digest()
