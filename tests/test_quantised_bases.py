"""Quantised checkpoints against the formulas of their formats, bitsandbytes also against its own package."""

import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import write_safetensors
from full_set import first_of_each, full_except
from quantised_files import BNB4, CASES, DIMS, NF4, Case, format_of, write_quantised
from safetensors.numpy import save_file
from tiny_bases import delta, llama_tensors, random_adapter, write_llama
from transfers import move_files

import jcrosslora as jcl
from jcrosslora.checkpoint import SafetensorsFile, ShardedStore, open_base
from jcrosslora.checkpoint.quantised import FORMATS, dequantised
from jcrosslora.checkpoint.quantised.format import scale_rows
from jcrosslora.decoder import load_model
from jcrosslora.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj"
LARGER = {**DIMS, "hidden": 128, "intermediate": 192, "head_dim": 32}  # several blocks per module
STATE = Q + ".weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module", params=first_of_each(CASES, format_of))
def quantised(request, tmp_path_factory):
    """A case, its folder, and the tensors that it represents."""
    folder = tmp_path_factory.mktemp("base")
    return CASES[request.param], folder, write_quantised(folder, CASES[request.param])


def test_weights_equal_the_formula_of_the_format(quantised):
    case, folder, meant = quantised
    base = open_base(folder)
    for name, module in base.modules.items():
        weight = base.weight(name)
        assert module.dtype == case.dtype
        assert weight.dtype == np.float32
        assert np.allclose(weight, meant[name + ".weight"], rtol=2e-6, atol=1e-9), name
    assert set(base.store.names()) == set(meant)


def test_the_formula_is_close_to_the_original_weights(quantised):
    """Guard against a format that writer and reader misunderstand alike: the values would be far off."""
    case, _, meant = quantised
    original = llama_tensors(seed=0, **DIMS)[Q + ".weight"]
    assert np.linalg.norm(meant[Q + ".weight"] - original) < case.error * np.linalg.norm(original)


def test_rows_are_dequantised_alone(quantised):
    _, folder, meant = quantised
    base = open_base(folder)
    ids = np.array([31, 0, 7, 7, 12])
    assert np.array_equal(base.rows(f"{Q}.weight", ids), base.weight(Q)[ids])
    assert np.allclose(base.rows("model.embed_tokens.weight", ids), meant["model.embed_tokens.weight"][ids])


def test_the_decoder_loads_quantised_weights(quantised):
    _, folder, meant = quantised
    params = load_model(open_base(folder)).params
    assert np.allclose(params.weights["down_proj"][0], meant["model.layers.0.mlp.down_proj.weight"], rtol=2e-6)
    assert params.weights["q_proj"].dtype == jnp.float32


def rewritten(folder, change):
    """Write the file again with some tensors changed; none of them is bfloat16 or float8."""
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: (entry.dtype, file.array(name).copy()) for name, entry in file.entries.items()}
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


OPTIONAL = (".g_idx", ".weight_format", ".weight_zero_point", ".weight_g_idx")


def test_missing_or_truncated_parts_are_refused(quantised, tmp_path):
    case, _, _ = quantised
    write_quantised(tmp_path, case)
    whole = (tmp_path / "model.safetensors").read_bytes()
    parts = [
        ending for ending in case.make(np.ones((32, 64), np.float32))[0] if ending not in (".weight", ".weight_format")
    ]
    for ending in parts:
        if not ending.endswith(OPTIONAL):
            (tmp_path / "model.safetensors").write_bytes(whole)
            rewritten(tmp_path, lambda tensors, name=Q + ending: tensors.pop(name))
            with pytest.raises(CheckpointError, match="q_proj"):
                open_base(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(whole)
        rewritten(tmp_path, lambda tensors, name=Q + ending: tensors.update({name: cut(tensors[name])}))
        with pytest.raises(CheckpointError, match="q_proj"):
            open_base(tmp_path)


def cut(tensor):
    """Remove one row or number; a single number becomes two."""
    dtype, array = tensor
    return dtype, array[:-1].copy() if array.size > 1 else np.repeat(array.reshape(-1), 2)


@pytest.mark.parametrize(("name", "file"), [("gptq 4 bits", "quantize_config.json"), ("awq", "quant_config.json")])
def test_packed_tensors_need_settings_in_config_or_in_a_file_of_their_own(name, file, tmp_path):
    write_quantised(tmp_path, CASES[name])
    whole = open_base(tmp_path).weight(Q)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"qweight' is packed as GPTQ and AWQ do.*quantization_config"):
        open_base(tmp_path)
    del settings["quant_method"]
    (tmp_path / file).write_text(json.dumps(settings))
    assert np.array_equal(open_base(tmp_path).weight(Q), whole)


def test_numbers_of_other_bits_than_stated_are_refused(tmp_path):
    """Older versions of compressed-tensors left bits of a word unused, which may look like another number of bits."""
    write_quantised(tmp_path, CASES["packed int4"])
    config = json.loads((tmp_path / "config.json").read_text())
    (weights,) = (group["weights"] for group in config["quantization_config"]["config_groups"].values())
    weights["num_bits"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="numbers of 4 bits are packed, and the configuration says 3"):
        open_base(tmp_path)


def test_a_group_that_does_not_exist_is_refused(tmp_path):
    write_quantised(tmp_path, CASES["gptq 4 bits"])
    rewritten(tmp_path, lambda tensors: tensors[Q + ".g_idx"][1].fill(2))
    with pytest.raises(CheckpointError, match="g_idx does not name one of 2 groups"):
        open_base(tmp_path)


def test_an_invalid_quant_state_is_refused(tmp_path):
    case = CASES["nf4, double"]
    for state in (
        b"{",
        b"[1]",
        b"{}",
        b'{"shape": [64, -64], "blocksize": 64}',
        b'{"shape": [64, 64], "blocksize": 0}',
    ):
        write_quantised(tmp_path, case)
        rewritten(tmp_path, lambda tensors, raw=state: tensors.update({STATE: ("U8", np.frombuffer(raw, np.uint8))}))
        with pytest.raises(CheckpointError, match="quant state"):
            open_base(tmp_path)


@pytest.mark.parametrize("double", [False, True])
def test_an_open_weight_keeps_no_copy_of_its_scales(double, tmp_path):
    """Copies would add up over all modules of a model, whose weights are read a few at a time."""
    blocks, state = 1 << 14, {"shape": [1024, 1024], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.5}
    parts = {
        ".weight": ("U8", np.zeros((1 << 19, 1), np.uint8)),
        ".weight.quant_map": ("F32", np.array(NF4, np.float32)),
        ".weight.quant_state.bitsandbytes__nf4": ("U8", np.frombuffer(json.dumps(state).encode(), np.uint8)),
        ".weight.absmax": ("U8", np.zeros(blocks, np.uint8)) if double else ("F32", np.ones(blocks, np.float32)),
    }
    if double:
        parts[".weight.nested_absmax"] = "F32", np.ones(blocks // 256, np.float32)
        parts[".weight.nested_quant_map"] = "F32", np.ones(256, np.float32)
    write_safetensors(tmp_path / "model.safetensors", {Q + ending: part for ending, part in parts.items()})
    store = dequantised(ShardedStore(tmp_path), {"quantization_config": BNB4}, "here")
    tracemalloc.start()
    try:
        assert store.shape(Q + ".weight") == (1024, 1024)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < blocks
    np.testing.assert_allclose(store.rows(Q + ".weight", np.arange(2)), -1.5 if double else -1)


def test_scales_of_small_groups_are_converted_on_demand():
    values = np.arange(1 << 15, dtype=np.float16).reshape(1024, 32)
    tracemalloc.start()
    try:
        rows = scale_rows(values, (1024, 1024))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows is not None
    assert kept < values.nbytes
    ids = np.array([3, 1023, 0])
    np.testing.assert_array_equal(rows(ids), np.repeat(values[ids].astype(np.float32), 32, axis=1))


@pytest.mark.parametrize("name", ["nf4, double", "fp4"])
def test_uneven_levels_are_recognised_as_rounding(name, tmp_path):
    write_quantised(tmp_path / "t", CASES[name], **LARGER)
    found = jcl.compare_bases(open_base(write_llama(tmp_path / "s", **LARGER)), open_base(tmp_path / "t"))
    assert found.words == ("quantised",), found.sentence


def test_every_format_is_tested():
    for form in (form for form in FORMATS if form.ending == ".weight"):  # `test_mxfp4.py` has the other
        assert any(case.settings and form.claims(case.settings) for case in CASES.values()), form.name


@pytest.mark.parametrize("name", full_except(["nf4, double", "gptq, act order", "awq"], ["nf4, double"]))
def test_an_adapter_is_transferred_to_a_quantised_copy_of_its_base(name, tmp_path):
    write_llama(tmp_path / "source", **DIMS)
    meant = write_quantised(tmp_path / "target", CASES[name])
    write_llama(tmp_path / "plain", **DIMS)
    save_file({key: tensor.astype(np.float32) for key, tensor in meant.items()}, tmp_path / "plain/model.safetensors")
    adapter = random_adapter(open_base(tmp_path / "source"), roles={"q_proj"})
    jcl.save_adapter(adapter, tmp_path / "adapter")

    def moved(target: str, method: str):
        places = (tmp_path / part for part in ("adapter", "source", target, f"out-{target}-{method}"))
        return move_files(*map(str, places), method=method, cache=False)

    auto = moved("target", "auto")
    assert auto.report.recipe.method == "copy"
    for module, factors in adapter.modules.items():
        assert np.allclose(delta(auto.adapter.modules[module]), delta(factors), atol=1e-4)
    aligned, expected = moved("target", "cross-lora"), moved("plain", "cross-lora")
    for module, factors in expected.adapter.modules.items():
        assert np.allclose(delta(aligned.adapter.modules[module]), delta(factors), atol=1e-3), module


BITSANDBYTES = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "double"), BITSANDBYTES)
def test_four_bit_weights_equal_those_of_bitsandbytes(kind, double, tmp_path):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")

    def make(weight):
        # Rows of whole blocks: for others the CPU kernel of bitsandbytes 0.50 differs from its definition.
        stored, state = functional.quantize_4bit(torch.from_numpy(weight), quant_type=kind, compress_statistics=double)
        values = functional.dequantize_4bit(stored, state).numpy()
        parts = {f".weight.{ending}": part for ending, part in state.as_dict(packed=True).items()}
        dtypes = {torch.uint8: "U8", torch.float32: "F32"}
        parts = {".weight": stored} | parts
        return {ending: (dtypes[part.dtype], part.numpy()) for ending, part in parts.items()}, values

    expected = write_quantised(tmp_path, Case(BNB4, make, kind.upper(), 1))
    base = open_base(tmp_path)
    for name in base.modules:
        assert np.allclose(base.weight(name), expected[name + ".weight"], atol=1e-7), name


@pytest.mark.slow
def test_eight_bit_weights_equal_those_of_bitsandbytes(tmp_path):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")

    def make(weight):
        stored, largest, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight))
        values = functional.int8_vectorwise_dequant(stored, largest).numpy()
        return {".weight": ("I8", stored.numpy()), ".SCB": ("F32", largest.numpy())}, values

    expected = write_quantised(tmp_path, Case(None, make, "INT8", 1))
    base = open_base(tmp_path)
    for name in base.modules:
        assert np.allclose(base.weight(name), expected[name + ".weight"], atol=1e-7), name


FP8 = {"num_bits": 8, "type": "float"}
COMPRESSED = [
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
    ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    ("pack-quantized", {"num_bits": 4, "strategy": "tensor"}),
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    ("float-quantized", {**FP8, "strategy": "channel"}),
    ("float-quantized", {**FP8, "strategy": "tensor"}),
    ("naive-quantized", {**FP8, "strategy": "block", "block_structure": [16, 16]}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "options"), COMPRESSED)
def test_weights_compressed_by_compressed_tensors_are_read(form, options, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    dtypes = {"int32": "I32", "int64": "I64", "float32": "F32", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}

    def make(weight):
        tensor = torch.from_numpy(weight)
        rows, columns = arguments.block_structure or (1, arguments.group_size or weight.shape[1])
        if options["strategy"] == "tensor":
            low, high = tensor.min().reshape(1), tensor.max().reshape(1)
        else:
            blocks = tensor.reshape(weight.shape[0] // rows, rows, -1, columns)
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        scale, zero = calculate_qparams(low, high, arguments)
        compressor = BaseCompressor.get_value_from_registry(form)
        whole = {"weight": tensor, "weight_scale": scale, "weight_zero_point": zero}
        stored = compressor.compress(whole, scheme)
        values = compressor.decompress(stored, scheme)["weight"].numpy()
        parts = {}
        for name, part in stored.items():
            raw = part.view(torch.uint8).numpy() if part.dtype == torch.float8_e4m3fn else part.numpy()
            parts["." + name] = (dtypes[str(part.dtype).removeprefix("torch.")], raw)
        return parts, values

    weights = json.loads(arguments.model_dump_json())
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"weights": weights}},
    }
    expected = write_quantised(tmp_path, Case(settings, make, "", 1))
    base = open_base(tmp_path)
    for name in base.modules:
        assert np.allclose(base.weight(name), expected[name + ".weight"], atol=1e-7), name
