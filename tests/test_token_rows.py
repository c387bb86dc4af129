"""Changes of embedding and head against peft and torch: read, moved to other vocabularies, written, merged.

The oracle is the adapted source itself: on a target that has its weights, but other ids, the same tokens must get the
same logits.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from adapter_folders import matrix, write_folder
from adapter_folders import tensors as lora_tensors
from checkpoint_files import llama_tensors, write_llama
from command_line import main
from full_set import first_of_each, full_except
from gguf_files import small_llama
from tiny_models import tiny_model, torch, transformers
from transfers import move_files

import jcrosslora as jcl
from jcrosslora.evaluate import Change, Effect
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.other_changes import target_ids

peft = pytest.importorskip("peft")
torch_files = pytest.importorskip("safetensors.torch")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WORDS, SPECIAL, LARGER = 90, 6, 110
ORDER = np.random.default_rng(5).permutation(LARGER)
ABSENT = (4, 33, 92)  # two words and a special token of the source that the larger vocabulary lacks
PLACES = np.where(np.isin(np.arange(WORDS + SPECIAL), ABSENT), -1, ORDER[: WORDS + SPECIAL])
SHARED = np.flatnonzero(PLACES >= 0)
BASES = {
    "tied": ("llama", True),
    "untied": ("llama", False),
    "scaled embedding": ("gemma2", True),
}
FEW, SOME = [2, 4, 91, 92, 17], [3, 50]
# What an adapter has beside q_proj, and how many rows of the embedding and of the head this changes, tied and untied.
FORMS = {
    "LoRA": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 3}}, (96, 96), None),
    "LoRA of the embedding": ({"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}, (96, 0), None),
    "whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, (96, 96), None),
    "whole embedding": ({"modules_to_save": ["embed_tokens"]}, (96, 0), None),
    "tokens": ({"trainable_token_indices": FEW}, (5, 5), (5, 0)),
    "tokens of both": ({"trainable_token_indices": {"embed_tokens": FEW, "lm_head": FEW}}, (5, 5), None),
    "others of each": ({"trainable_token_indices": {"embed_tokens": FEW, "lm_head": SOME}}, (5, 2), None),
    "tokens of the head": ({"trainable_token_indices": {"lm_head": SOME}}, (0, 2), None),
}
TIED_FORMS = {
    "LoRA of both": ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, (96, 96), None),
    "whole of both": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, (96, 96), None),
}
CASES = [
    *((base, form) for base in BASES for form in FORMS),
    *((base, form) for base in ("tied", "scaled embedding") for form in TIED_FORMS),
]


def write_tokenizer(folder: Path, places: np.ndarray, extra: range) -> None:
    """Words and special tokens under the ids that they have, and new words."""
    vocab = {f"w{token}": int(place) for token, place in enumerate(places[:WORDS]) if place >= 0}
    vocab |= {f"new{place}": int(place) for place in extra}
    spaces = {"add_prefix_space": False, "trim_offsets": True}
    special = [(f"<s{token}>", int(places[token])) for token in range(WORDS, WORDS + SPECIAL) if places[token] >= 0]
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [
                    {"id": place, "content": name, "special": True}
                    | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                    for name, place in special
                ],
                "pre_tokenizer": {"type": "ByteLevel", "use_regex": True} | spaces,
                "decoder": {"type": "ByteLevel"} | spaces,
                "model": {"type": "BPE", "vocab": vocab, "merges": []},
            }
        )
    )


def source_model(base: str):
    family, tied = BASES[base]
    return tiny_model(family, num_hidden_layers=1, tie_word_embeddings=tied)


def larger_model(base: str, *, tied: bool | None = None):
    """The source with its tokens in another order, and more of them."""
    family, was_tied = BASES[base]
    state = source_model(base).state_dict()
    tied = was_tied if tied is None else tied
    model = tiny_model(family, seed=9, num_hidden_layers=1, tie_word_embeddings=tied, vocab_size=LARGER)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = model.state_dict()[name].clone()
        table[PLACES[SHARED]] = state[name][SHARED]
        state[name] = state["model.embed_tokens.weight"] if tied and "head" in name else table
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for base in BASES:
        for name, model, places in (
            ("source", source_model(base), np.arange(WORDS + SPECIAL)),
            ("larger", larger_model(base), PLACES),
            ("other", larger_model(base, tied=not BASES[base][1]), PLACES),
        ):
            model.save_pretrained(folder / base / name)
            write_tokenizer(folder / base / name, places, range(len(places), LARGER) if len(places) > 96 else range(0))
    return folder


def make_adapter(base: str, form: str, out: Path, *, rows=None):
    """A trained adapter, saved by peft, and the model with it; of whole matrices only some `rows` are changed."""
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]} | (FORMS | TIED_FORMS)[form][0]
    model = peft.get_peft_model(source_model(base), peft.LoraConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                change = 0.3 * torch.randn_like(parameter)
                if rows is not None and "modules_to_save" in name:
                    change[[row for row in range(len(change)) if row not in rows]] = 0
                parameter.add_(change)
    model.save_pretrained(out, save_embedding_layers=False)
    return model.eval()


def logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))[None]).logits[0].numpy()


def transfer(folder: Path, base: str, adapter: Path, out: Path, target: str = "larger", **changes):
    names = {"adapter": adapter, "source": folder / base / "source", "target": folder / base / target, "out": out}
    chosen = {"method": "copy", "profile": "peft", "cache": False} | changes
    return move_files(**{key: str(value) for key, value in names.items()}, **chosen)


def changed_rows(base: str, form: str) -> tuple[int, int]:
    _, tied, untied = (FORMS | TIED_FORMS)[form]
    return tied if BASES[base][1] or untied is None else untied


@pytest.mark.parametrize(("base", "form"), first_of_each(CASES, lambda case: case[1]))
def test_moved_by_copy_the_same_tokens_get_the_same_logits(tmp_path, bases, base, form):
    adapted = make_adapter(base, form, tmp_path / "adapter")
    moved = transfer(bases, base, tmp_path / "adapter", tmp_path / "out")
    target = peft.PeftModel.from_pretrained(larger_model(base), str(tmp_path / "out")).eval()
    wanted, found = logits(adapted, SHARED), logits(target, PLACES[SHARED])
    np.testing.assert_allclose(found[:, PLACES[SHARED]], wanted[:, SHARED], atol=1e-4)
    plain = logits(source_model(base), SHARED)
    assert np.abs(wanted - plain).max() > 0.1
    counts = dict.fromkeys(("model.embed_tokens", "lm_head"), 0)
    for row in moved.report.tokens:
        counts |= dict.fromkeys(row.modules, row.rows)
        lost = ABSENT if row.rows == 96 else set(ABSENT) & set(FEW if row.rows == 5 else SOME)
        assert row.moved == row.rows - len(lost)
        assert (row.kept < 1) == bool(lost)
    assert tuple(counts.values()) == changed_rows(base, form)
    assert not any("moved" in warning for warning in moved.report.warnings)
    # Tokens that the source does not have are as they were.
    new = np.setdiff1d(np.arange(LARGER), PLACES)
    before = larger_model(base).model.embed_tokens.weight[new]
    after = target.get_base_model().model.embed_tokens(torch.tensor(new)) / getattr(
        larger_model(base).model.embed_tokens, "embed_scale", 1
    )
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("base", "form"), first_of_each(CASES, lambda case: case[1]))
def test_merged_and_written_again_for_its_own_base(tmp_path, bases, base, form):
    adapted, every = make_adapter(base, form, tmp_path / "adapter"), np.arange(WORDS + SPECIAL)
    wanted, source = logits(adapted, every), str(bases / base / "source")
    export = jcl.ExportSettings((str(tmp_path / "adapter"),), str(tmp_path / "again"), profile="peft", base=source)
    assert jcl.export_adapter(export).adapter.info.ignored == ()
    again = peft.PeftModel.from_pretrained(source_model(base), str(tmp_path / "again")).eval()
    np.testing.assert_allclose(logits(again, every), wanted, atol=1e-4)
    done = jcl.merge(jcl.MergeSettings(source, str(tmp_path / "again"), str(tmp_path / "merged")))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(logits(merged, every), wanted, atol=1e-4)
    assert done.modules == 1 + sum(count > 0 for count in changed_rows(base, form))
    parts = BASES[base][1] and form not in ("tokens", "tokens of both", *TIED_FORMS)
    assert any("no longer the embedding" in note for note in done.notes) == parts
    assert merged.config.tie_word_embeddings == (BASES[base][1] and not parts)


ALONE = {
    "the embedding": ["embed_tokens"],
    "the head": ["lm_head"],
    "both": ["embed_tokens", "lm_head"],
}


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("part", ALONE)
def test_an_adapter_of_them_alone_is_merged_and_exported_and_not_moved(tmp_path, bases, base, part, capsys):
    if base == "tied" and part == "the head":
        pytest.skip("peft adapts a tied head only together with the embedding")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=ALONE[part])
    model = peft.get_peft_model(source_model(base), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder, source, every = tmp_path / "adapter", str(bases / base / "source"), np.arange(WORDS + SPECIAL)
    model.save_pretrained(folder, save_embedding_layers=False)
    wanted = logits(model.eval(), every)
    main(["merge", source, str(folder), "--out", str(tmp_path / "merged"), "--fail-on", "loss"])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(logits(merged, every), wanted, atol=1e-4)
    again = ["--profile", "peft", "--out-rank", "1", "--base", source, "--out", str(tmp_path / "again")]
    main(["export", str(folder), *again, "--fail-on", "loss"])
    loaded = peft.PeftModel.from_pretrained(source_model(base), str(tmp_path / "again")).eval()
    np.testing.assert_allclose(logits(loaded, every), wanted, atol=1e-4)
    main(["check", str(folder), "--base", source])
    main(["inspect", str(folder), "--base", source])
    assert "cannot be moved alone, but merged and exported" in capsys.readouterr().out
    with pytest.raises(jcl.AdapterError, match="nothing can be moved; merge and export hold changes of embedding and"):
        transfer(bases, base, folder, tmp_path / "out")
    export = jcl.ExportSettings((str(folder),), str(tmp_path / "gguf"), profile="gguf", base=source)
    with pytest.raises(jcl.OutputError, match="profile gguf does not hold it"):
        jcl.export_adapter(export)


@pytest.mark.parametrize("base", full_except(BASES, ["tied", "untied"]))
@pytest.mark.parametrize("form", FORMS)
def test_between_tied_and_untied_bases(tmp_path, bases, base, form):
    adapted = make_adapter(base, form, tmp_path / "adapter")
    transfer(bases, base, tmp_path / "adapter", tmp_path / "out", "other")
    model = larger_model(base, tied=not BASES[base][1])
    head = model.lm_head.weight.detach().numpy()[PLACES[SHARED]]
    target = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()
    # The head is another one where an untied base becomes tied: what the adapter changes of it must be the same.
    own = logits(target, PLACES[SHARED])[:, PLACES[SHARED]]
    wanted = logits(adapted, SHARED)[:, SHARED]
    if BASES[base][1]:
        np.testing.assert_allclose(own, wanted, atol=1e-4)
        return
    state = source_model(base).state_dict()["lm_head.weight"].numpy()[SHARED]
    hidden = []
    handle = adapted.get_base_model().model.norm.register_forward_hook(lambda *call: hidden.append(call[2]))
    logits(adapted, SHARED)
    handle.remove()
    np.testing.assert_allclose(own, wanted + hidden[0][0].numpy() @ (head - state).T, atol=1e-4)


def test_few_rows_of_a_whole_matrix_become_tokens(tmp_path, bases):
    adapted = make_adapter("untied", "whole", tmp_path / "adapter", rows=FEW)
    moved = transfer(bases, "untied", tmp_path / "adapter", tmp_path / "out")
    assert [len(update.ids) for update in moved.adapter.tokens] == [3, 3]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tokens = sorted(int(PLACES[token]) for token in FEW if token not in ABSENT)
    assert config["trainable_token_indices"] == {"embed_tokens": tokens, "lm_head": tokens}
    assert config["modules_to_save"] is None
    target = peft.PeftModel.from_pretrained(larger_model("untied"), str(tmp_path / "out")).eval()
    found = logits(target, PLACES[SHARED])[:, PLACES[SHARED]]
    np.testing.assert_allclose(found, logits(adapted, SHARED)[:, SHARED], atol=1e-4)


def test_what_is_tied_in_the_adapter_stays_one_change(tmp_path, bases):
    base = jcl.open_base(bases / "tied" / "source")
    for form, rows, size in (("whole of both", FEW, 5), ("whole of both", None, 96), ("LoRA of both", None, 96)):
        out = tmp_path / f"{form} {size}"
        make_adapter("tied", form, out, rows=rows)
        (update,) = jcl.load_adapter(out, base).tokens
        assert (update.table, len(update.ids)) == ("tied", size)


@pytest.mark.parametrize("form", ["tokens", "whole"])
def test_rows_keep_every_bit_where_the_bases_agree(tmp_path, bases, form):
    adapted = make_adapter("untied", form, tmp_path / "adapter")
    moved = transfer(bases, "untied", tmp_path / "adapter", tmp_path / "out")
    trained = adapted.get_base_model().model.embed_tokens.weight.detach().numpy()
    update = next(update for update in moved.adapter.tokens if update.table == "embed_tokens")
    rows = dict(zip(update.ids.tolist(), update.rows, strict=True))
    for token in FEW:
        if token not in ABSENT:
            np.testing.assert_array_equal(rows[PLACES[token]], trained[token])


def energies(base: str, adapted, form: str) -> dict[str, float]:
    """Squared norms of what torch has changed, by the sort of change."""
    inner, plain = adapted.get_base_model(), source_model(base)

    def change(table, before) -> float:
        return float(((table.detach() - before.detach()).double() ** 2).sum())

    q = inner.model.layers[0].self_attn.q_proj
    found = {"": float((q.get_delta_weight("default").detach().double() ** 2).sum())}
    if form == "LoRA":
        found["embedding"] = float((inner.model.embed_tokens.get_delta_weight("default").detach().double() ** 2).sum())
        found["head"] = float((inner.lm_head.get_delta_weight("default").detach().double() ** 2).sum())
    else:
        sort = "tokens" if form == "tokens" else "full"
        found[sort] = change(inner.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_lose_nothing_in_a_file_of_half_precision(tmp_path, bases, dtype):
    make_adapter("untied", "tokens", tmp_path / "adapter")
    base = jcl.open_base(bases / "untied" / "source")
    adapter = jcl.load_adapter(tmp_path / "adapter", base)
    (update,) = adapter.tokens
    old, kind = base.rows("model.embed_tokens.weight", update.ids), getattr(torch, dtype)
    slightly = (old + 1e-4 * (update.rows - old)).astype(np.float32)
    exactly = torch.tensor(update.rows).to(kind).float().numpy()
    for rows, stored in ((slightly, torch.float32), (exactly, kind)):
        changed = dataclasses.replace(adapter, tokens=(dataclasses.replace(update, rows=rows),))
        out = jcl.save_adapter(changed, tmp_path / "out", base=base, profile="peft", dtype=dtype, overwrite=True)
        tensors = torch_files.load_file(out / "adapter_model.safetensors")
        found = {name.rsplit(".", 1)[1]: x for name, x in tensors.items()}
        assert found["trainable_tokens_delta"].dtype == stored
        assert found["weight"].dtype == kind
        np.testing.assert_array_equal(jcl.load_adapter(out, base).tokens[0].rows, rows)


def test_what_a_lower_rank_loses_of_them_is_told(tmp_path, bases):
    adapted = make_adapter("untied", "LoRA", tmp_path / "adapter").get_base_model()
    modules = adapted.model.layers[0].self_attn.q_proj, adapted.model.embed_tokens, adapted.lm_head
    spectra = [np.linalg.svd(x.get_delta_weight("default").detach().double(), compute_uv=False) ** 2 for x in modules]
    found = jcl.load_adapter(tmp_path / "adapter", jcl.open_base(bases / "untied" / "source"), rank=1)
    total = sum(spectrum.sum() for spectrum in spectra)
    assert found.info.lost == pytest.approx(1 - sum(spectrum[0] for spectrum in spectra) / total, rel=1e-5)
    assert "read at rank 1, which loses" in found.info.read_as
    for update, spectrum in zip(found.tokens, spectra[1:], strict=True):
        assert update.energy == pytest.approx(spectrum[0], rel=1e-5)
        assert update.share == pytest.approx(spectrum.sum() / total, rel=1e-5)


@pytest.mark.parametrize("form", ["LoRA", "whole embedding", "tokens"])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "pad-truncate"}, "method pad-truncate does not keep the coordinates"),
        ({"method": "cross-lora", "profile": "portable"}, "method cross-lora does not keep the coordinates"),
        ({"profile": "portable"}, "profile portable does not hold it"),
        ({"profile": "mlx"}, "profile mlx does not hold it"),
    ],
)
def test_elsewhere_they_are_listed_with_their_share(tmp_path, bases, form, changes, why):
    adapted = make_adapter("tied", form, tmp_path / "adapter")
    moved = transfer(bases, "tied", tmp_path / "adapter", tmp_path / "out", "source", **changes)
    found = energies("tied", adapted, form)
    said = [warning for warning in moved.report.warnings if warning.startswith("not moved: ")]
    assert len(said) == len(found) - 1
    for sort, sentence in zip([sort for sort in found if sort], said, strict=True):
        assert f"({found[sort] / sum(found.values()):.1%} of the whole change's squared norm): {why}" in sentence
    assert not moved.adapter.tokens
    if changes.get("profile") != "mlx":
        assert list(jcl.load_adapter(tmp_path / "out").modules) == ["model.layers.0.self_attn.q_proj"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(sentence in card for sentence in said)


def test_without_its_base_they_are_listed(tmp_path, bases, capsys):
    make_adapter("untied", "LoRA", tmp_path / "adapter")
    adapter = jcl.load_adapter(tmp_path / "adapter")
    assert adapter.tokens == ()
    assert len(adapter.info.ignored) == 2
    assert all("the base that it was trained on was not given" in sentence for sentence in adapter.info.ignored)
    main(["export", str(tmp_path / "adapter"), "--profile", "peft", "--out", str(tmp_path / "out")])
    assert "not written: LoRA of an embedding, model.embed_tokens" in capsys.readouterr().out
    main(["inspect", str(tmp_path / "adapter"), "--base", str(bases / "untied" / "source")])
    assert (
        "can be moved by copy, interpolated-copy, compensated-copy, distilled-copy, select, distilled-select alone: "
        "LoRA of an embedding" in capsys.readouterr().out
    )


def test_shift_carries_them(tmp_path, bases):
    make_adapter("tied", "tokens", tmp_path / "adapter")
    pair = tuple(jcl.open_base(bases / "tied" / name) for name in ("source", "larger"))
    adapter = jcl.load_adapter(tmp_path / "adapter", pair[0])
    transport = jcl.align(*pair, method="copy")
    moved = jcl.shift(transport, adapter)
    assert [row.moved for row in moved.report.tokens] == [3]
    out = moved.save(tmp_path / "out")
    share = f"({adapter.tokens[0].share:.1%} of the whole change's squared norm): profile portable"
    assert f"not written: trained tokens (trainable_token_indices), model.embed_tokens, lm_head {share}" in (
        out / "README.md"
    ).read_text(encoding="utf-8")
    assert json.loads((out / "transfer_report.json").read_text())["tokens"] == []
    out = moved.save(tmp_path / "peft", profile="peft")
    assert "3 of 5 rows moved" in (out / "README.md").read_text()
    assert jcl.load_adapter(out, pair[1]).tokens[0].same_change(moved.adapter.tokens[0])


def test_select_takes_the_dimensions_that_the_target_has(tmp_path, bases):
    kept = np.sort(np.random.default_rng(2).permutation(48)[:40])
    source = jcl.open_base(bases / "untied" / "source")
    narrow = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=False, hidden_size=40, head_dim=12)
    state = source_model("untied").state_dict()
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            value = state[name]
            for axis in range(value.ndim):
                if value.shape[axis] == 48 and parameter.shape[axis] == 40:
                    value = value.index_select(axis, torch.tensor(kept))
            parameter.copy_(value)
    narrow.save_pretrained(tmp_path / "narrow")
    write_tokenizer(tmp_path / "narrow", np.arange(WORDS + SPECIAL), range(0))
    target = jcl.open_base(tmp_path / "narrow")
    for form in ("LoRA", "tokens"):
        adapted = make_adapter("untied", form, tmp_path / form).merge_and_unload()
        adapter = jcl.load_adapter(tmp_path / form, source)
        moved = jcl.shift(jcl.align(source, target, method="select"), adapter)
        moved.save(tmp_path / f"{form} out", profile="peft")
        found = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow"), str(tmp_path / f"{form} out")
        ).merge_and_unload()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            wanted = adapted.state_dict()[name][:, kept]
            torch.testing.assert_close(found.state_dict()[name], wanted, atol=1e-5, rtol=1e-5)
        assert all(row.moved == row.rows and 0 < row.kept < 1 for row in moved.report.tokens)


def test_tokens_are_matched_by_their_text(bases, tmp_path):
    source, larger = (jcl.open_base(bases / "tied" / name) for name in ("source", "larger"))
    np.testing.assert_array_equal(target_ids(BasePair(source, larger))[0], PLACES)
    np.testing.assert_array_equal(target_ids(BasePair(source, source))[0], np.arange(96))
    source_model("tied").save_pretrained(tmp_path / "mute")
    mute = jcl.open_base(tmp_path / "mute")
    np.testing.assert_array_equal(target_ids(BasePair(mute, dataclasses.replace(mute)))[0], np.arange(96))
    places, reason = target_ids(BasePair(mute, larger))
    assert places is None
    assert "no tokenizer.json" in reason


def test_a_vocabulary_that_cannot_be_read_leaves_them_behind(tmp_path, bases):
    make_adapter("tied", "tokens", tmp_path / "adapter")
    larger_model("tied").save_pretrained(tmp_path / "mute")
    moved = transfer(bases, "tied", tmp_path / "adapter", tmp_path / "out", str(tmp_path / "mute"))
    assert any("no tokenizer.json" in warning for warning in moved.report.warnings)


def test_the_sum_of_adapters_has_what_one_of_them_has(tmp_path, bases):
    make_adapter("tied", "tokens", tmp_path / "one")
    adapted = make_adapter("tied", "LoRA", tmp_path / "two")
    del adapted
    make_adapter("tied", "tokens of the head", tmp_path / "three")
    base = jcl.open_base(bases / "tied" / "source")
    out = str(tmp_path / "out")
    plain = jcl.save_adapter(
        dataclasses.replace(jcl.load_adapter(tmp_path / "one", base), tokens=()), tmp_path / "plain", base=base
    )
    settings = jcl.ExportSettings((str(plain), str(tmp_path / "one")), out, profile="peft", base=str(base.path))
    assert [update.table for update in jcl.export_adapter(settings).adapter.tokens] == ["tied"]
    both = dataclasses.replace(settings, adapter=(str(tmp_path / "one"), str(tmp_path / "three")), overwrite=True)
    exported = jcl.export_adapter(both).adapter
    assert exported.tokens == ()
    assert sum("several adapters of the sum change them" in sentence for sentence in exported.info.ignored) == 2


def test_where_bases_are_run_it_is_said_that_they_were_run_without(tmp_path, bases, monkeypatch, capsys):
    make_adapter("tied", "tokens", tmp_path / "adapter")
    change = Change(0.2, 0.1, 4.0, 4.0)
    effect = Effect.of((change, change), (0.0, 0.01), texts=12, positions=700, written=True)
    monkeypatch.setattr("jcrosslora.session.conclusion._measured", lambda *_: effect)
    monkeypatch.setattr("jcrosslora.session.conclusion.why_not_run", lambda *_: None)
    moved = transfer(bases, "tied", tmp_path / "adapter", tmp_path / "out", effect="always")
    said = "where the bases were run, it was without the changes of the embedding and the output head"
    assert said in moved.report.warnings
    question, *choices = (f"<s{WORDS + place}>" for place in range(3))
    (tmp_path / "task.jsonl").write_text(json.dumps({"question": question, "choices": choices, "answer": 0}))
    base, adapter = str(bases / "tied" / "source"), str(tmp_path / "adapter")
    main(["evaluate", "--base", base, "--data", str(tmp_path / "task.jsonl"), "--adapter", adapter])
    assert "not scored: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "tensors", "why"),
    [
        ({"trainable_token_indices": [3, 3]}, {}, "does not name 2 tokens of the base"),
        ({"trainable_token_indices": [3, 96]}, {}, "does not name 2 tokens of the base"),
        ({"trainable_token_indices": None}, {}, "does not name 2 tokens of the base"),
        ({"trainable_token_indices": {"lm_head": [1, 2]}}, {}, "does not name 2 tokens of the base"),
        ({}, {"model.embed_tokens.weight": np.ones((96, 48))}, "embed_tokens is changed in another way as well"),
        ({}, {"lm_head.weight": np.ones((97, 48))}, "lm_head is 97 x 48, in the base"),
        ({}, {"model.norm.weight": np.ones((48,))}, "model.norm is neither the embedding nor the output head"),
        ({}, {"model.embed_tokens.lora_embedding_A": np.ones((2, 96))}, "the file is damaged"),
    ],
)
def test_what_cannot_be_read_is_listed_with_the_reason(tmp_path, bases, config, tensors, why):
    make_adapter("untied", "tokens", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    indices = {"trainable_token_indices": [3, 5]}
    path.write_text(json.dumps(json.loads(path.read_text()) | indices | config))
    weights = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, array in weights.items():
        if "trainable" in name:
            weights[name] = array[:2]
    weights |= {f"base_model.model.{name}": array.astype(np.float32) for name, array in tensors.items()}
    safetensors.numpy.save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    adapter = jcl.load_adapter(tmp_path / "adapter", jcl.open_base(bases / "untied" / "source"))
    assert [sentence for sentence in adapter.info.ignored if why in sentence]
    assert len(adapter.tokens) == (1 if tensors else 0)
    assert list(adapter.modules) == ["model.layers.0.self_attn.q_proj"]


def test_a_batch_carries_them_as_well(tmp_path, bases):
    make_adapter("tied", "tokens", tmp_path / "adapter")
    plan = f"""
out = "moved"
[bases]
source = "{bases / "tied" / "source"}"
larger = "{bases / "tied" / "larger"}"
[adapters]
source = ["{tmp_path / "adapter"}"]
[[moves]]
from = "source"
to = ["larger"]
methods = ["copy"]
profile = "peft"
"""
    (tmp_path / "plan.toml").write_text(plan)
    main(["batch", str(tmp_path / "plan.toml")])
    (written,) = (tmp_path / "moved").rglob("adapter_config.json")
    assert len(json.loads(written.read_text())["trainable_token_indices"]["embed_tokens"]) == 3


@pytest.mark.parametrize("kind", ["GGUF", "head in the file"])
def test_a_tied_base_of_another_form_gets_a_head_of_its_own(tmp_path, kind):
    tensors = llama_tensors()
    name = "model.embed_tokens.weight"
    if kind == "GGUF":
        path, _ = small_llama(tmp_path / "base.gguf")
    else:
        path = write_llama(tmp_path / "base", tensors | {"lm_head.weight": tensors[name]})
    base = jcl.open_base(path)
    assert base.tied
    size, width = base.dims.vocab, base.dims.hidden
    q = base.modules["model.layers.0.self_attn.q_proj"]
    weights = lora_tensors([q.name], rows=q.shape[0], width=width)
    embedding = "base_model.model.model.embed_tokens"
    a, b = matrix(2, size, seed=8), matrix(width, 2, seed=9)
    weights |= {f"{embedding}.lora_embedding_A": a, f"{embedding}.lora_embedding_B": b}
    adapter = write_folder(tmp_path / "adapter", weights=weights)
    jcl.merge(jcl.MergeSettings(str(path), str(adapter), str(tmp_path / "out"), dtype="float32"))
    merged = jcl.open_base(tmp_path / "out")
    assert not merged.tied
    table = base.rows(name, np.arange(size))
    np.testing.assert_allclose(merged.tensor(name), table + 2 * (b @ a).T, atol=1e-5)
    np.testing.assert_array_equal(merged.tensor("lm_head.weight"), table)


@pytest.mark.parametrize("form", full_except(["LoRA", "tokens"], ["tokens"]))
def test_rows_follow_the_weights_where_a_tokenizer_contradicts_them(tmp_path, bases, form):
    """Equal weights under a permuted tokenizer: the moved adapter has the source's effect on the same ids."""
    shutil.copytree(bases / "tied" / "source", bases / "tied" / form)
    write_tokenizer(bases / "tied" / form, np.random.default_rng(1).permutation(WORDS + SPECIAL), range(0))
    adapted = make_adapter("tied", form, tmp_path / "adapter")
    moved = transfer(bases, "tied", tmp_path / "adapter", tmp_path / "out", form)
    found = peft.PeftModel.from_pretrained(source_model("tied"), str(tmp_path / "out")).eval()
    every = np.arange(WORDS + SPECIAL)
    np.testing.assert_allclose(logits(found, every), logits(adapted, every), atol=1e-4)
    assert any("ids stand for other tokens" in warning for warning in moved.report.warnings)
