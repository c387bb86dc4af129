"""Compress a base in several ways, to move adapters of the whole base onto the results.

    python experiments/compress.py BASE.gguf OUT [--how bf16 q4_0 rtn4-64 rtn3-32 pruned50 ...] [--texts FILE]

For each way a GGUF file OUT/NAME.gguf with the metadata and the tokenizer of BASE. bf16 is the whole base, whatever
BASE itself was rounded to. q4_0 and the other types that the gguf package can write are stored as such, with the
embedding in Q8_0. nf4 rounds to the 16 levels of QLoRA (arXiv 2305.14314) times the largest number of each block of 64.
rtnBITS-BLOCK rounds to the nearest of 2^BITS even levels between the ends of each block, and prunedP sets the smallest
P% of the numbers of every matrix to zero. These leave the embedding as it is, and are stored as float16. awqBITS-BLOCK
rounds as rtnBITS-BLOCK does, after scales of channels by AWQ (arXiv 2306.00978) on the texts of FILE, without its
clipping: they multiply the columns of a module, and divide the gain of the norm or the rows of the module in front.
Only here norms are changed. Prints the relative error of the matrices of all layers together, with their scales.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType

import jcrosslora as jcl
from jcrosslora.evaluate.examples import read_prompts
from jcrosslora.evaluate.probes import Probes
from jcrosslora.maps.activations import batch_probes, input_rows
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.text.completion import prompt_text

WAYS = ("bf16", "q4_0", "rtn4-64", "rtn3-32", "pruned50")
NF4 = np.array(
    [
        *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ],
    np.float32,
)
# What is in front of modules that read the same, as a file calls it; and these modules, in this package and in a file.
AWQ_GROUPS = {
    "attn_norm": {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    "ffn_norm": {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    "ffn_up": {"mlp.down_proj": "ffn_down"},
}
Compress = Callable[[np.ndarray], tuple[np.ndarray, Kind]]


def compressor(how: str) -> Compress:
    """Return what makes the stored form of a matrix, bytes or float16, with its type.

    Raises:
        ValueError: the way is unknown.
    """
    if found := re.fullmatch(r"(?:rtn|awq)([2-8])-(\d+)", how):
        bits, block = map(int, found.groups())
        return lambda x: (round_to_nearest(x, bits, block).astype(np.float16), Kind.F16)
    if how == "nf4":
        return lambda x: (round_to_nf4(x).astype(np.float16), Kind.F16)
    if found := re.fullmatch(r"pruned(\d\d)", how):
        share = int(found[1]) / 100
        return lambda x: (prune(x, share).astype(np.float16), Kind.F16)
    kind = Kind.__members__.get(how.upper())
    if kind is None:
        msg = f"{how!r} is unknown; expected a type of ggml such as q4_0, rtnBITS-BLOCK such as rtn3-32, or pruned50"
        raise ValueError(msg)
    return lambda x: (gguf.quants.quantize(x, kind), kind)


def round_to_nearest(x: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Round each block of a row (O, I) to even levels from its smallest to its largest number."""
    parts = x.reshape(-1, block)
    low, high = parts.min(axis=1, keepdims=True), parts.max(axis=1, keepdims=True)
    step = np.maximum((high - low) / (2**bits - 1), np.finfo(np.float32).tiny)
    return (low + step * np.round((parts - low) / step)).reshape(x.shape)


def round_to_nf4(x: np.ndarray) -> np.ndarray:
    """Round blocks of 64 numbers, divided by their largest, to the nearest level of NF4."""
    parts = x.reshape(-1, 64)
    scale = np.maximum(np.abs(parts).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    between = (NF4[1:] + NF4[:-1]) / 2
    return (NF4[np.searchsorted(between, parts / scale)] * scale).reshape(x.shape)


def prune(x: np.ndarray, share: float) -> np.ndarray:
    """Set the smallest numbers of a matrix to zero."""
    return np.where(np.abs(x) < np.quantile(np.abs(x), share), np.float32(0), x)


def copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """Write all metadata of a file but the fields of the container."""
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)


def awq_scales(source: Path, texts: Path, compress: Compress) -> dict[str, np.ndarray]:
    """Return what AWQ multiplies the norms and matrices of a GGUF file of llama by.

    The scales of the channels that modules read are powers of their mean absolute inputs on the texts, with the
    exponent that leaves the least error in the modules' outputs.
    """
    base = jcl.open_base(source)
    tokenised = batch_probes(BasePair(base, base), Probes(tuple(map(prompt_text, read_prompts(texts))), "texts"))[1]
    inputs, found = input_rows(base, tokenised), {}
    for layer in range(base.dims.layers):
        for front, behind in AWQ_GROUPS.items():
            x = np.asarray(inputs(f"model.layers.{layer}.{next(iter(behind))}"))
            weights = [base.weight(f"model.layers.{layer}.{name}") for name in behind]
            factors = min(
                (powers(x, 0.1 * step) for step in range(10)), key=partial(_error, weights, x.T @ x, compress)
            )
            for name in behind.values():
                found[f"blk.{layer}.{name}.weight"] = factors
            before = f"blk.{layer}.{front}.weight"
            found[before] = found[before] / factors[:, None] if before in found else 1 / factors
    return found


def powers(inputs: np.ndarray, exponent: float) -> np.ndarray:
    """Return powers of the mean absolute inputs (N, I), with a product of the largest and the smallest of one."""
    sizes = np.maximum(np.abs(inputs).mean(axis=0), 1e-4) ** exponent
    return (sizes / np.sqrt(sizes.max() * sizes.min())).astype(np.float32)


def _error(weights: list[np.ndarray], gram: np.ndarray, compress: Compress, factors: np.ndarray) -> float:
    """Return the squared error of the modules' outputs where their columns have these scales when they are rounded."""
    total = 0.0
    for weight in weights:
        stored, kind = compress(weight * factors)
        error = gguf.quants.dequantize(stored, kind).reshape(weight.shape) / factors - weight
        total += float(np.sum((error @ gram) * error))
    return total


def write(source: Path, out: Path, how: str, texts: Path | None) -> float:
    """Write a compressed copy of a GGUF file; return the relative error of its layers' matrices."""
    reader, compress = gguf.GGUFReader(source), compressor(how)
    if how.startswith("awq") and texts is None:
        raise ValueError(f"{how} needs --texts, a file of prompts on which inputs are measured")
    scales = awq_scales(source, texts, compress) if how.startswith("awq") and texts is not None else {}
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    copy_metadata(reader, writer)
    error = size = 0.0
    for tensor in reader.tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]).astype(np.float32)
        x = x * scales.get(tensor.name, np.float32(1))
        if x.ndim != 2:
            stored, kind = x, Kind.F32
        elif tensor.name.startswith("blk."):
            stored, kind = compress(x)
            read = gguf.quants.dequantize(stored, kind).reshape(x.shape)
            error, size = error + float(np.sum((read - x) ** 2)), size + float(np.sum(x**2))
        else:
            kind = {"b": Kind.BF16, "q": Kind.Q8_0}.get(how[0], Kind.F16)
            stored = gguf.quants.quantize(x, kind)
        writer.add_tensor(tensor.name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (error / size) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--how", nargs="+", default=list(WAYS))
    parser.add_argument("--texts", type=Path, help="prompts, one a line or JSONL; for awq alone")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for how in arguments.how:
        try:
            error = write(arguments.base, arguments.out / f"{how}.gguf", how, arguments.texts)
        except ValueError as wrong:
            parser.error(str(wrong))
        print(f"{how}: relative error {error:.3f}")


if __name__ == "__main__":
    main()
