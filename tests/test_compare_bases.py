"""Test the comparison of bases on constructed pairs with a known relation."""

import dataclasses
import json

import numpy as np
import pytest
from real_models import real_models
from relatives import (
    is_linear,
    layer_of,
    make,
    merged,
    noisy,
    rescaled,
    role_of,
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
from safetensors.numpy import save_file
from tiny_bases import llama_tensors, write_llama

import jcrosslora as jcl
from jcrosslora.architectures.families import FAMILIES
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.cli.main import main
from jcrosslora.relation import RelationFlag, compare_bases

SAME, ROUNDED, QUANTISED, TRAINED = ("same",), ("rounded",), ("quantised",), ("further trained",)
MERGED, SCALED, UNRELATED = ("LoRA-merged",), ("scaled",), ("unrelated",)
PRUNED, SPARSE, PERMUTED, UPSCALED = ("pruned",), ("sparse",), ("permuted",), ("upscaled",)
UNSURE, RESCALED = ("further trained or quantised",), ("channels rescaled",)
OTHER_EMBEDDING, OTHER_HEAD, OTHER_TOKENIZER = ("embedding replaced",), ("head replaced",), ("other tokenizer",)


def same(made):
    return made


def mixed_heads(layer, groups, served):
    """Permute the groups of heads, and the heads of each group."""
    return [group * served + shuffled(served, 31 + layer) for group in shuffled(groups, 41 + layer)]


def kept_heads(layer, groups, served):
    return [[group * served + layer % served] for group in range(groups)]


def second_group(layer, groups, served):
    return [np.arange(served) + served * (layer % groups)]


def after_q4(change):
    return lambda made: change(made.quantised("Q4_0"))


def int8_rows(made):
    """Round every row to multiples of a 127th of its largest number, as LLM.int8 does."""

    def change(_, x):
        step = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        return np.round(x / step) * step if x.ndim == 2 else x

    return made.change(change)


mixed_neurons = with_neurons(lambda layer, count: shuffled(count, 20 + layer))
fewer_neurons = with_neurons(lambda layer, count: subset(count, 60 + layer, count // 2))
reordered = then(mixed_neurons, with_heads(mixed_heads), with_stream(shuffled(64, 5)))
values_moved = with_heads(
    lambda layer, groups, served: np.arange(groups * served).reshape(groups, served),
    lambda layer, size: shuffled(size, 70 + layer),
)


def with_embedding_of(other, made):
    """Return the layers of `made` with the embeddings of `other`."""
    return made.change(lambda name, x: other.tensors[name] if ".layers." not in name and x.ndim == 2 else x)


def with_layers_of(made, other, layers, part=""):
    return made.change(lambda name, x: other.tensors[name] if layer_of(name) in layers and part in name else x)


def with_other_head(made):
    return made.change(lambda name, x: x[::-1].copy() if name == "lm_head.weight" else x)


def with_one_number(made):
    def change(name, x):
        x = x.copy()
        if name == "model.layers.1.mlp.up_proj.weight":
            x[0, 5] += 1e-3
        return x

    return made.change(change)


def with_extra_layers(made, other):
    """Append two layers of another base."""
    extra = {
        name.replace(f".{layer}.", f".{layer + 4}.", 1): x
        for name, x in other.tensors.items()
        for layer in (0, 1)
        if layer_of(name) == layer
    }
    return dataclasses.replace(made, config=made.config | {"num_hidden_layers": 6}, tensors=made.tensors | extra)


def with_averaged_keys(made):
    """Average both key-value heads, as in the conversion of multi-head to grouped-query attention."""
    half = made.size("head_dim")

    def change(name, x):
        return (x[:half] + x[half:]) / 2 if role_of(name) in ("k_proj", "v_proj") else x

    return made.change(change, num_key_value_heads=1)


def renamed(made, family):
    config = {"model_type": family, "architectures": list(FAMILIES[family].architectures[:1])}
    return dataclasses.replace(made, config=made.config | config)


def pruned(made):
    """Set the smaller half of the numbers of every linear matrix to zero."""
    return made.change(lambda name, x: np.where(np.abs(x) < np.median(np.abs(x)), 0, x) if is_linear(name) else x)


# name: (family, change of the base, dtypes or quantisations of both, expected words)
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
    "channels rescaled": ("llama", rescaled(0.5), ("F32", "F32"), (*RESCALED, *ROUNDED)),
    "channels rescaled, gemma": ("gemma2", rescaled(0.3), ("BF16", "BF16"), (*RESCALED, *ROUNDED)),
    "channels rescaled, Q4_0": ("llama", rescaled(0.3), ("F32", "gguf Q4_0"), (*UNSURE, *RESCALED, *QUANTISED)),
    "channels rescaled, trained": ("llama", then(rescaled(0.5), noisy(0.1)), ("F32", "F32"), (*TRAINED, *RESCALED)),
    "from Q4_0": ("llama", same, ("Q4_0", "F32"), QUANTISED),
    "Q8_0 against Q4_0": ("llama", same, ("Q8_0", "Q4_0"), QUANTISED),
    "Q4_0, kept in float16": ("llama", lambda made: made.quantised("Q4_0"), ("F32", "F16"), QUANTISED),
    "Q5_0, kept in bfloat16": ("qwen2", lambda made: made.quantised("Q5_0"), ("F32", "BF16"), QUANTISED),
    "Q8_0, kept in bfloat16": ("llama", lambda made: made.quantised("Q8_0"), ("BF16", "BF16"), QUANTISED),
    "Q8_0 of float32, kept in bfloat16": ("qwen2", lambda made: made.quantised("Q8_0"), ("F32", "BF16"), QUANTISED),
    "Q8_0, kept in float16": ("llama", lambda made: made.quantised("Q8_0"), ("F32", "F16"), QUANTISED),
    "int8 rows, kept in bfloat16": ("gemma2", int8_rows, ("BF16", "BF16"), QUANTISED),
    "trained, Q8_0, kept in bfloat16": (
        "llama",
        lambda made: noisy(0.05)(made).quantised("Q8_0"),
        ("BF16", "BF16"),
        (*TRAINED, *QUANTISED),
    ),
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
    "one number": ("llama", with_one_number, ("F32", "F32"), TRAINED),
    "merged": ("llama", merged(4, 0.01), ("F32", "F32"), MERGED),
    "merged in bfloat16": ("gemma3_text", merged(2, 0.02), ("BF16", "BF16"), MERGED),
    "merged everywhere": ("qwen2", merged(4, 0.01, roles=("q_proj", "o_proj", "up_proj")), ("F32", "F32"), MERGED),
    "merged, to bfloat16": ("llama", merged(4, 0.02), ("F32", "BF16"), (*MERGED, *ROUNDED)),
    "merged, fused": ("phi3", merged(3, 0.01, roles=("qkv_proj",)), ("F32", "F32"), MERGED),
    "half of the numbers zero": ("llama", pruned, ("F32", "F32"), SPARSE),
    "half of the numbers zero, fused": ("phi3", pruned, ("BF16", "BF16"), SPARSE),
    "half of the numbers zero, to bfloat16": ("llama", pruned, ("F32", "BF16"), (*SPARSE, *ROUNDED)),
    "trained, half of the numbers zero": ("llama", then(noisy(0.05), pruned), ("F32", "F32"), (*SPARSE, *TRAINED)),
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


# Bases that share little or nothing, and targets with more than the source; name: (family, target, expected words).
OTHERS = {
    "other seed": ("llama", make(seed=1), UNRELATED),
    "other seed, gemma": ("gemma3_text", make("gemma3_text", seed=1), UNRELATED),
    "other seed, fused": ("phi3", make("phi3", seed=1), UNRELATED),
    "other width": ("llama", make(seed=1, hidden_size=96), UNRELATED),
    "other depth": ("qwen2", make("qwen2", seed=1, num_hidden_layers=3), UNRELATED),
    "other heads": ("llama", make(seed=1, num_attention_heads=8, num_key_value_heads=4, head_dim=8), UNRELATED),
    "other family": ("llama", make("qwen3", seed=1), UNRELATED),
    "other vocabulary": ("mistral", make("mistral", seed=1, vocab_size=200), UNRELATED),
    "the embedding alone": ("llama", with_embedding_of(make(), make(seed=1)), UNRELATED),
    "the norms alone": ("llama", make().change(lambda n, x: x if x.ndim == 1 else x[::-1].copy()), UNRELATED),
    "the family's name alone": ("llama", renamed(make(), "mistral"), SAME),
    "another embedding": ("llama", with_embedding_of(make(seed=1), make()), OTHER_EMBEDDING),
    "more layers": ("llama", with_extra_layers(make(), make(seed=1)), ("extended",)),
    "half of the layers": ("llama", with_layers_of(make(), make(seed=1), (1, 3)), ("pruned", "extended")),
    "half of the attention": ("llama", with_layers_of(make(), make(seed=1), (1,), "attn"), ("pruned", "extended")),
    "more tokens": ("llama", with_tokens(np.arange(100))(make()), PRUNED),
    "zeros": ("llama", make(seed=1).change(lambda _, x: 0 * x), UNRELATED),
    "heads averaged": ("llama", with_averaged_keys(make()), ("pruned", "extended")),
}


def written(made, folder, dtype):
    if dtype in ("F32", "F16", "BF16"):
        return made.write(folder, dtype)
    return made.write_gguf(folder / "model.gguf", dtype.removeprefix("gguf "))


@pytest.mark.parametrize("name", CASES)
def test_constructed_relation_is_recognised(tmp_path, name):
    family, change, dtypes, words = CASES[name]
    made = make(family).rounded(dtypes[0])
    source, target = (
        written(x, tmp_path / side, d) for x, side, d in zip((made, change(made)), "st", dtypes, strict=True)
    )
    found = compare_bases(source, target)
    assert found.words == words, found.sentence
    json.dumps(found.to_json(), allow_nan=False)


def test_relation_is_made_of_members_that_are_plain_words_in_json(tmp_path):
    made = make()
    found = compare_bases(made.write(tmp_path / "s"), with_layers([0, 3])(made).quantised("Q8_0").write(tmp_path / "t"))
    assert found.words == (RelationFlag.PRUNED, RelationFlag.QUANTISED)
    content = json.loads(json.dumps(found.to_json()))
    assert content["words"] == ["pruned", "quantised"]
    assert {item["difference"]["change"] for item in content["compared"]} == {"equal", "rounded"}


@pytest.mark.parametrize("name", OTHERS)
def test_relation_of_independent_and_extended_bases_in_both_directions(tmp_path, name):
    family, made, words = OTHERS[name]
    source, target = make(family).write(tmp_path / "s"), made.write(tmp_path / "t")
    found = compare_bases(source, target)
    assert found.words == words, found.sentence
    back = compare_bases(target, source)
    turned = {"pruned": "extended", "extended": "pruned"}
    assert set(back.words) == {turned.get(word, word) for word in words}, back.sentence
    assert (found.choice.method == "copy") == (words in (SAME, OTHER_EMBEDDING) or name == "more tokens")


def test_independent_bases_are_unrelated(tmp_path):
    """None of 45 pairs of small bases agrees by chance; a third of them have equal widths."""
    bases = [make(seed=seed, intermediate_size=64 + 96 * (seed % 3)).write(tmp_path / str(seed)) for seed in range(10)]
    for place, source in enumerate(bases):
        for target in bases[:place]:
            assert compare_bases(source, target).words == UNRELATED


def test_bases_of_zeros_are_related_only_to_equal_ones(tmp_path):
    """Such as files whose numbers were never written."""
    sizes = [{}, {"intermediate_size": 160}, {"num_hidden_layers": 3, "hidden_size": 96}]
    empty = [make(**size).change(lambda _, x: 0 * x).write(tmp_path / str(n)) for n, size in enumerate(sizes)]
    assert [compare_bases(empty[0], base).words for base in empty] == [SAME, UNRELATED, UNRELATED]


def test_layer_of_zeros_does_not_hide_the_relation(tmp_path):
    made = make().change(lambda name, x: 0 * x if layer_of(name) == 2 and x.ndim == 2 else x)
    source = made.write(tmp_path / "s")
    assert compare_bases(source, made.write(tmp_path / "t")).words == SAME
    assert compare_bases(source, noisy(0.02)(made).write(tmp_path / "n")).words == TRAINED


@pytest.mark.parametrize("row", [1, 33, 63])
def test_one_changed_number_outside_the_sample_is_found(tmp_path, row):
    made = make(vocab_size=700)

    def change(name, x):
        x = x.copy()
        if name == "model.embed_tokens.weight":
            x[row, 5] += 1e-3
        return x

    source, target = made.write(tmp_path / "s"), made.change(change).write(tmp_path / "t")
    found = compare_bases(source, target)
    assert found.words == TRAINED
    assert "embed" in found.sentence


def test_copy_is_recognised_by_bytes_or_by_all_numbers(tmp_path):
    source = make().write(tmp_path / "s")
    assert compare_bases(source, make().write(tmp_path / "t")).sentence == "the weight files are equal, byte by byte"
    wide = make().rounded("BF16")
    found = compare_bases(wide.write(tmp_path / "b", "BF16"), wide.write(tmp_path / "f"))
    assert found.words == SAME
    assert found.sentence == "all numbers of all tensors are equal, though the files are not"


def test_rotary_buffers_of_older_files_are_ignored(tmp_path):
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for n in range(4)}
    made = make()
    older = dataclasses.replace(made, tensors=made.tensors | buffers)
    for source, target in ((older, made), (made, older)):
        found = compare_bases(source.write(tmp_path / "s"), target.write(tmp_path / "t"))
        assert (found.words, found.choice.method) == (SAME, "copy")


@pytest.mark.parametrize("tokens", [100, 128, 150])
def test_equal_layers_with_other_embeddings_are_not_the_same(tmp_path, tokens):
    """The embedding may be shorter, equally long or longer."""
    table = np.random.default_rng(5).normal(size=(tokens, 64)).astype(np.float32)
    changed = make().change(lambda name, x: table if name == "model.embed_tokens.weight" else x, vocab_size=tokens)
    source, target = make().write(tmp_path / "s"), changed.write(tmp_path / "t")
    for pair in ((source, target), (target, source)):
        found = compare_bases(*pair)
        assert found.words == OTHER_EMBEDDING
        assert "the two have nothing in common in the embedding" in found.sentence


def test_another_head_on_equal_or_trained_layers_is_named(tmp_path):
    made = make(tie_word_embeddings=False)
    source = made.write(tmp_path / "s")
    for change, words in ((same, OTHER_HEAD), (noisy(0.02), (*TRAINED, *OTHER_HEAD))):
        found = compare_bases(source, with_other_head(change(made)).write(tmp_path / words[0]))
        assert found.words == words
        assert "the two have nothing in common in the head" in found.sentence


@pytest.mark.parametrize("swapped", [96, 2, 0])
def test_equal_weights_under_another_tokenizer_are_not_the_same(tmp_path, swapped):
    source, target = (write_llama(tmp_path / side) for side in "st")
    path = target / "tokenizer.json"
    content = json.loads(path.read_text())
    order = np.append(np.roll(np.arange(swapped), 1), np.arange(swapped, 96))
    content["model"]["vocab"] = {f"w{token}": int(place) for token, place in enumerate(order)}
    path.write_text(json.dumps(content))
    found = compare_bases(open_base(source), open_base(target))
    assert found.words == (OTHER_TOKENIZER if swapped else SAME)
    assert found.choice.method == "copy"
    assert ("one and the same base" in found.choice.reason) == (swapped == 0)
    assert (f"{swapped} of 96 ids stand for other tokens" in found.sentence) == (swapped > 0)


def test_tokens_that_moved_with_their_rows_are_no_other_tokenizer(tmp_path):
    source, target = (write_llama(tmp_path / side) for side in "st")
    order = shuffled(96, 3)
    tensors = llama_tensors()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][np.argsort(order)]
    save_file(tensors, target / "model.safetensors")
    content = json.loads((target / "tokenizer.json").read_text())
    content["model"]["vocab"] = {f"w{token}": int(place) for token, place in enumerate(order)}
    (target / "tokenizer.json").write_text(json.dumps(content))
    assert compare_bases(open_base(source), open_base(target)).words == PERMUTED


def test_scale_factors_are_listed_in_increasing_order(tmp_path):
    factors: dict[int | None, float] = {0: 9.0, 1: 10.0, 2: 0.5}
    scaled = make().change(lambda name, x: x * factors.get(layer_of(name), 1) if "down_proj" in name else x)
    found = compare_bases(make().write(tmp_path / "s"), scaled.write(tmp_path / "t"))
    assert "3 factors from 0.5 to 10" in found.sentence


def test_parts_and_layers_of_a_pruned_base_are_counted(tmp_path):
    change = then(with_layers([0, 3]), fewer_neurons, with_heads(kept_heads), with_stream(subset(64, 3, 48)))
    found = compare_bases(make().write(tmp_path / "s"), change(make()).write(tmp_path / "t"))
    parts = {part.name: (part.found, part.target, part.used, part.source) for part in found.parts}
    assert parts == {
        "layers": (2, 2, 2, 4),
        "stream dimensions": (48, 48, 48, 64),
        "heads": (2, 2, 2, 4),
        "key heads": (2, 2, 2, 2),
        "head features": (16, 16, 16, 16),
        "neurons": (48, 48, 48, 96),
        "tokens": (128, 128, 128, 128),
    }
    assert found.layers == (0, 3)
    assert {item.difference.change for item in found.compared} == {"equal"}
    assert (
        "the target has 2 of 4 layers, 48 of 64 stream dimensions, 2 of 4 heads, 48 of 96 neurons of the source"
        in found.sentence
    )


def test_rank_and_size_of_a_merged_update_are_reported(tmp_path):
    made = make()
    target = merged(4, 0.02, roles=("q_proj", "down_proj"))(made)
    found = compare_bases(made.write(tmp_path / "s"), target.write(tmp_path / "t"))
    for item in found.compared:
        if item.role in ("q_proj", "down_proj"):
            assert (item.difference.change, item.difference.rank) == ("low rank", 4)
            assert item.difference.distance == pytest.approx(0.02, rel=0.3)
        else:
            assert item.difference.change == "equal"
    assert "8 of 30 tensors differ by an update of low rank" in found.sentence
    assert "ranks: q_proj 4, down_proj 4" in found.sentence


def test_rank_beyond_the_sample_is_found_with_more_rows(tmp_path):
    made = make(intermediate_size=320, hidden_size=320, num_hidden_layers=1, vocab_size=400)
    target = merged(50, 0.02, roles=("up_proj",))(made)
    found = compare_bases(made.write(tmp_path / "s"), target.write(tmp_path / "t"))
    assert found.words == MERGED
    assert "ranks: up_proj 50" in found.sentence


def test_only_a_sample_of_rows_is_read(tmp_path, monkeypatch):
    made = make(intermediate_size=800, vocab_size=3000)
    source, target = made.write(tmp_path / "s"), noisy(0.02)(made).write(tmp_path / "t")
    asked: dict[str, list[int]] = {}
    rows = BaseModel.rows

    def watched(self, name, ids):
        asked.setdefault(name, []).append(len(ids))
        return rows(self, name, ids)

    monkeypatch.setattr(BaseModel, "rows", watched)
    monkeypatch.setattr(BaseModel, "weight", None)
    assert compare_bases(source, target).words == TRAINED
    assert max(map(max, asked.values())) <= 512
    assert max(asked["model.layers.1.mlp.up_proj.weight"]) <= 64


def test_result_is_the_same_on_every_run(tmp_path):
    source, target = make().write(tmp_path / "s"), then(reordered, noisy(0.05))(make()).write(tmp_path / "t")
    assert compare_bases(source, target).to_json() == compare_bases(source, target).to_json()


@pytest.mark.parametrize("part", ["up_proj", "input_layernorm.weight", "q_proj.bias"])
def test_weight_with_nan_is_an_error(tmp_path, part):
    whole = make("qwen2")
    damaged = whole.change(lambda name, x: np.full_like(x, np.nan) if part in name else x)
    with pytest.raises(jcl.CheckpointError, match=f"{part} holds NaN or infinity"):
        compare_bases(whole.write(tmp_path / "s"), damaged.write(tmp_path / "t"))


def test_command_prints_evidence_first_and_relation_last(tmp_path, capsys):
    make().write(tmp_path / "s")
    then(fewer_neurons, merged(3, 0.01))(make()).write(tmp_path / "t")
    main(["compare", str(tmp_path / "s"), str(tmp_path / "t")])
    printed = capsys.readouterr().out
    assert printed.startswith("relation: pruned, LoRA-merged\nmethod: auto would take ")
    assert "auto would take select" in printed
    main(["compare", str(tmp_path / "s"), str(tmp_path / "t"), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["words"] == ["pruned", "LoRA-merged"]
    assert data["choice"]["method"] == "select"
    assert len(data["compared"]) == 30
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "s"), str(tmp_path / "nothing")])


@pytest.mark.slow
def test_real_bases_are_unrelated_and_each_equals_itself():
    smol, gemma = map(open_base, real_models())
    assert compare_bases(smol, gemma).words == UNRELATED
    assert compare_bases(smol, smol).words == SAME
