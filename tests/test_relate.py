"""What two bases have to do with each other, on made pairs of every kind: the truth is known of each."""

import json

import numpy as np
import pytest
from relatives import (
    make,
    merged,
    noisy,
    scaled,
    shuffled,
    subset,
    then,
    with_heads,
    with_layers,
    with_neurons,
    with_stream,
    with_tokens,
)

from jcrosslora.relation import relate

SAME, ROUNDED, QUANTISED, TRAINED = ("same",), ("rounded",), ("quantised",), ("further trained",)
MERGED, SCALED, UNRELATED = ("LoRA-merged",), ("scaled",), ("unrelated",)
PRUNED, PERMUTED, UPSCALED = ("pruned",), ("permuted",), ("upscaled",)
UNSURE = ("further trained or quantised",)


def same(made):
    return made


def mixed_heads(layer, groups, served):
    """Groups in another order, and the heads of each in another order."""
    return [group * served + shuffled(served, 31 + layer) for group in shuffled(groups, 41 + layer)]


def kept_heads(layer, groups, served):
    return [[group * served + layer % served] for group in range(groups)]


def second_group(layer, groups, served):
    return [np.arange(served) + served * (layer % groups)]


def after_q4(change):
    return lambda made: change(made.quantised("Q4_0"))


mixed_neurons = with_neurons(lambda layer, count: shuffled(count, 20 + layer))
fewer_neurons = with_neurons(lambda layer, count: subset(count, 60 + layer, count // 2))
reordered = then(mixed_neurons, with_heads(mixed_heads), with_stream(shuffled(64, 5)))
values_moved = with_heads(
    lambda layer, groups, served: np.arange(groups * served).reshape(groups, served),
    lambda layer, size: shuffled(size, 70 + layer),
)

# name: (family, what becomes of the base, dtypes or quantisations of both, the words)
CASES = {
    "a copy": ("llama", same, ("F32", "F32"), SAME),
    "a copy, gemma": ("gemma3_text", same, ("F32", "F32"), SAME),
    "a copy, fused": ("phi3", same, ("BF16", "BF16"), SAME),
    "to bfloat16": ("llama", same, ("F32", "BF16"), ROUNDED),
    "to float16": ("qwen2", same, ("F32", "F16"), ROUNDED),
    "from bfloat16": ("mistral", same, ("BF16", "F32"), SAME),
    "from float16 to bfloat16": ("llama", same, ("F16", "BF16"), ROUNDED),
    "to float16, back": ("gemma2", same, ("F16", "F32"), SAME),
    "Q8_0": ("llama", same, ("F32", "Q8_0"), QUANTISED),
    "Q5_1": ("llama", same, ("F32", "Q5_1"), QUANTISED),
    "Q4_0": ("llama", same, ("BF16", "Q4_0"), QUANTISED),
    "Q4_1": ("llama", same, ("F32", "Q4_1"), QUANTISED),
    "from Q4_0": ("llama", same, ("Q4_0", "F32"), QUANTISED),
    "Q8_0 against Q4_0": ("llama", same, ("Q8_0", "Q4_0"), QUANTISED),
    "Q4_0, kept in float16": ("llama", lambda made: made.quantised("Q4_0"), ("F32", "F16"), QUANTISED),
    "Q5_0, kept in bfloat16": ("qwen2", lambda made: made.quantised("Q5_0"), ("F32", "BF16"), QUANTISED),
    "Q4_0, then Q8_0": ("llama", lambda made: made.quantised("Q4_0"), ("Q4_0", "Q8_0"), QUANTISED),
    "Q4_1, then Q4_0": ("llama", lambda made: made.quantised("Q4_1"), ("Q4_1", "Q4_0"), QUANTISED),
    "Q4_1, then float16": ("llama", lambda made: made.quantised("Q4_1"), ("Q4_1", "F16"), ROUNDED),
    "trained after Q4_0": ("llama", after_q4(noisy(0.02)), ("Q4_0", "F32"), TRAINED),
    "merged after Q4_0": ("llama", after_q4(merged(4, 0.01)), ("Q4_0", "F32"), MERGED),
    "GGUF in float16": ("llama", same, ("F16", "gguf F16"), SAME),
    "trained, 1%": ("llama", noisy(0.01), ("F32", "F32"), TRAINED),
    "trained, 5%": ("qwen3", noisy(0.05), ("BF16", "BF16"), TRAINED),
    "trained, 0.2% in bfloat16": ("llama", noisy(0.002), ("BF16", "BF16"), TRAINED),
    "trained, 60%": ("llama", noisy(0.6), ("F32", "F32"), TRAINED),
    "trained, MLP alone": ("llama", noisy(0.02, only=lambda n: ".mlp." in n), ("F32", "F32"), TRAINED),
    "trained, embedding alone": ("llama", noisy(0.02, only=lambda n: "embed" in n), ("F32", "F32"), TRAINED),
    "trained, to Q8_0": ("llama", noisy(0.03), ("F32", "Q8_0"), (*TRAINED, *QUANTISED)),
    "trained, to Q4_0": ("llama", noisy(0.03), ("F32", "Q4_0"), UNSURE),
    "both Q4_0, trained between": ("llama", noisy(0.03), ("Q4_0", "Q4_0"), UNSURE),
    "merged": ("llama", merged(4, 0.01), ("F32", "F32"), MERGED),
    "merged in bfloat16": ("gemma3_text", merged(2, 0.02), ("BF16", "BF16"), MERGED),
    "merged everywhere": ("qwen2", merged(4, 0.01, roles=("q_proj", "o_proj", "up_proj")), ("F32", "F32"), MERGED),
    "merged, to bfloat16": ("llama", merged(4, 0.02), ("F32", "BF16"), (*MERGED, *ROUNDED)),
    "merged, fused": ("phi3", merged(3, 0.01, roles=("qkv_proj",)), ("F32", "F32"), MERGED),
    "tripled": ("llama", scaled(3.0), ("F32", "F32"), SCALED),
    "halved": ("mistral", scaled(0.5), ("BF16", "BF16"), SCALED),
    "negated": ("llama", scaled(-1.0), ("F32", "F32"), SCALED),
    "fewer layers": ("llama", with_layers([0, 2, 3]), ("F32", "F32"), PRUNED),
    "fewer layers, fused": ("phi3", with_layers([1, 3]), ("F32", "F32"), PRUNED),
    "fewer neurons": ("llama", fewer_neurons, ("F32", "F32"), PRUNED),
    "fewer neurons, gemma": ("gemma2", fewer_neurons, ("BF16", "BF16"), PRUNED),
    "fewer heads": ("llama", with_heads(kept_heads), ("F32", "F32"), PRUNED),
    "fewer key heads": ("qwen2", with_heads(second_group), ("F32", "F32"), PRUNED),
    "narrower": ("llama", with_stream(subset(64, 3, 48)), ("F32", "F32"), PRUNED),
    "fewer tokens": ("llama", with_tokens(np.arange(100)), ("F32", "F32"), PRUNED),
    "fewer of all": (
        "llama",
        then(with_layers([0, 1, 3]), fewer_neurons, with_heads(kept_heads), with_stream(subset(64, 3, 56))),
        ("F32", "F32"),
        PRUNED,
    ),
    "repeated layers": ("llama", with_layers([0, 1, 2, 1, 2, 3]), ("F32", "F32"), UPSCALED),
    "repeated layers, trained": (
        "gemma3_text",
        then(with_layers([0, 1, 1, 2, 2, 3]), noisy(0.02)),
        ("F32", "F32"),
        (*UPSCALED, *TRAINED),
    ),
    "neurons permuted": ("llama", mixed_neurons, ("F32", "F32"), PERMUTED),
    "heads permuted": ("llama", with_heads(mixed_heads), ("F32", "F32"), PERMUTED),
    "stream permuted": ("mistral", with_stream(shuffled(64, 5)), ("F32", "F32"), PERMUTED),
    "layers permuted": ("llama", with_layers([0, 2, 1, 3]), ("F32", "F32"), PERMUTED),
    "values permuted": ("llama", values_moved, ("F32", "F32"), PERMUTED),
    "all permuted": ("qwen3", reordered, ("F32", "F32"), PERMUTED),
    "all permuted, fewer neurons": ("gemma2", then(reordered, fewer_neurons), ("F32", "F32"), (*PRUNED, *PERMUTED)),
    "all permuted, trained": ("llama", then(reordered, noisy(0.05)), ("F32", "F32"), (*PERMUTED, *TRAINED)),
    "all permuted, merged": ("llama", then(reordered, merged(3, 0.01)), ("F32", "F32"), (*PERMUTED, *MERGED)),
    "all permuted, Q4_0": ("llama", reordered, ("F32", "Q4_0"), (*PERMUTED, *QUANTISED)),
    "fewer layers, Q8_0": ("llama", with_layers([0, 3]), ("F32", "Q8_0"), (*PRUNED, *QUANTISED)),
    "fewer neurons, trained": ("llama", then(fewer_neurons, noisy(0.03)), ("F32", "F32"), (*PRUNED, *TRAINED)),
    "fewer layers, bfloat16": ("qwen2", with_layers([0, 1, 2]), ("F32", "BF16"), (*PRUNED, *ROUNDED)),
}


def written(made, folder, dtype):
    if dtype in ("F32", "F16", "BF16"):
        return made.write(folder, dtype)
    return made.write_gguf(folder / "model.gguf", dtype.removeprefix("gguf "))


@pytest.mark.parametrize("name", CASES)
def test_the_relation_is_the_one_that_was_made(tmp_path, name):
    family, change, dtypes, words = CASES[name]
    made = make(family).rounded(dtypes[0])
    source, target = (
        written(x, tmp_path / side, d) for x, side, d in zip((made, change(made)), "st", dtypes, strict=True)
    )
    found = relate(source, target)
    assert found.words == words, found.sentence
    json.dumps(found.to_json(), allow_nan=False)
