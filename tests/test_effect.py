"""The effect check: figures by brute force, and what is called ineffective, destructive, plausible."""

import dataclasses
import io
import json

import jax
import msgspec
import numpy as np
import pytest
from probe_bases import CORPUS, write_base
from rich.console import Console
from tiny_bases import random_adapter
from transfers import transfer_settings

import jcrosslora as jcl
from jcrosslora import transfer_files
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import LoadedBases, forward, load_model, logits, stack_adapter
from jcrosslora.errors import AdapterError, MethodError, UsageError
from jcrosslora.evaluate import Change, Effect, check_effect
from jcrosslora.evaluate import effect as effect_module
from jcrosslora.evaluate.effect import adapter_texts
from jcrosslora.evaluate.probes import match_positions
from jcrosslora.methods import PadTruncate, Random
from jcrosslora.report import REPORT, complete, documents, model_card, print_report, published
from jcrosslora.report.table import effect_rows
from jcrosslora.utils.picking import pick_evenly

TEXTS, WRITTEN = CORPUS[:3], ["Anna said that Plants need Water.", "Peter and Anna and The dog."]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two bases with different tokenizers and widths, and an adapter for each."""
    folder = tmp_path_factory.mktemp("bases")
    source = jcl.open_base(write_base(folder / "source", 30, bos=True, layers=2))
    target = jcl.open_base(write_base(folder / "target", 90, layers=2, hidden=32, head_dim=8, seed=1))
    return (source, random_adapter(source, scale=0.01)), (target, random_adapter(target, scale=0.01, seed=5))


def scaled(adapter, factor):
    modules = {name: dataclasses.replace(item, scale=item.scale * factor) for name, item in adapter.modules.items()}
    return dataclasses.replace(adapter, modules=modules)


@jax.jit
def all_logits(model, tokens, adapter):
    return logits(model, forward(model.with_adapter(adapter), tokens).hidden[0])


def exact_log_probs(base, adapter, ids) -> np.ndarray:
    """float64 (T, V), one text at a time."""
    # Padded, so that all texts are one shape; what follows a token changes nothing before it.
    tokens = np.pad(ids, (0, effect_module.LENGTH - len(ids)))
    stacked = None if adapter is None else stack_adapter(adapter, base)
    scores = np.asarray(all_logits(load_model(base), tokens, stacked), np.float64)[: len(ids)]
    top = scores.max(axis=-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))


def by_brute_force(pair, texts, side):
    """For each text: mean divergence, NLL without and NLL with the adapter."""
    base, adapter = pair[side]
    tokenizers = [load_tokenizer(one) for one, _ in pair]
    rows = []
    for text in texts:
        encoded = [
            dataclasses.replace(one, ids=one.ids[: effect_module.LENGTH], ends=one.ends[: effect_module.LENGTH])
            for one in (tokenizer.encode(text) for tokenizer in tokenizers)
        ]
        matches = [(x, y) for x, y in zip(*match_positions(*encoded), strict=True) if min(x, y) > 0]
        places = [match[side] for match in matches]
        ids = encoded[side].ids
        plain, adapted = (exact_log_probs(base, one, ids) for one in (None, adapter))
        kl = [np.sum(np.exp(plain[p]) * (plain[p] - adapted[p])) for p in places[:-1]]
        nll = [-sum(log[p, ids[p + 1]] for p in range(places[0], places[-1])) / len(kl) for log in (plain, adapted)]
        rows.append((np.mean(kl), *nll, len(kl)))
    return np.array(rows).T


def test_effect_equals_that_of_every_text_run_alone(pair):
    effect = check_effect(*pair, TEXTS, written=WRITTEN)
    for side, change in enumerate((effect.source, effect.target)):
        kl, _, _, count = by_brute_force(pair, TEXTS, side)
        _, nll, adapted, count_written = by_brute_force(pair, WRITTEN, side)
        assert kl.mean() > 0.01
        wanted = (kl.mean(), kl.std(ddof=1), nll.mean(), adapted.mean())
        np.testing.assert_allclose(msgspec.structs.astuple(change), wanted, rtol=2e-3)
        assert effect.positions == count.sum() + count_written.sum()
    growth = adapted - nll
    assert effect.excess == pytest.approx(growth.mean(), abs=2e-3)
    assert effect.excess_error == pytest.approx(growth.std(ddof=1) / len(growth) ** 0.5, rel=2e-2)
    assert (effect.texts, effect.written) == (5, True)


def test_without_written_texts_growth_is_relative_to_the_source(pair):
    effect = check_effect(*pair, TEXTS)
    growth_src, growth_tgt = (change.nll_adapted - change.nll for change in (effect.source, effect.target))
    assert effect.excess == pytest.approx(growth_tgt - growth_src, abs=1e-4)
    assert not effect.written


def test_preloaded_weights_give_the_same_effect(pair):
    source, kept = pair[0][0], LoadedBases([np.dtype(np.float32)])
    assert check_effect(*pair, TEXTS, loaded=kept) == check_effect(*pair, TEXTS)
    assert kept.model(source) is kept.model(source)


def test_adapter_on_its_own_base_is_plausible(pair):
    effect = check_effect(pair[0], pair[0], TEXTS)
    assert effect.source == effect.target
    assert (effect.share, effect.excess, effect.outcome) == (1, 0, "plausible")


@pytest.mark.parametrize(("factor", "outcome"), [(0, "ineffective"), (0.01, "ineffective"), (50, "destructive")])
def test_weak_update_is_ineffective_and_huge_one_destructive(pair, factor, outcome):
    original, (target, moved) = pair
    effect = check_effect(original, (target, scaled(moved, factor)), TEXTS)
    assert effect.outcome == outcome
    assert outcome in effect.sentence
    assert (effect.target.kl == 0) == (factor == 0)


def test_update_with_infinite_predictions_is_destructive_and_valid_json(pair):
    original, (target, moved) = pair
    effect = check_effect(original, (target, scaled(moved, 1e30)), TEXTS)
    assert effect.outcome == "destructive"
    data = json.loads(msgspec.json.encode(effect))
    assert data["target"]["kl"] is None
    assert data["outcome"] == "destructive"
    assert "nan" not in effect.sentence + str(effect_rows(effect))


def test_non_finite_original_is_refused(pair):
    (source, adapter), moved = pair
    with pytest.raises(AdapterError, match="not finite"):
        check_effect((source, scaled(adapter, 1e30)), moved, TEXTS)


def test_original_without_effect_gives_outcome_unmeasured(pair):
    (source, adapter), moved = pair
    assert check_effect((source, scaled(adapter, 0)), moved, TEXTS).outcome == "unmeasured"


@pytest.mark.parametrize("texts", [[], ["a"]])
def test_too_short_texts_are_refused_for_an_effect(pair, texts):
    with pytest.raises(UsageError, match="give"):
        check_effect(*pair, texts)


def test_short_texts_among_longer_ones_are_skipped(pair):
    alone = check_effect(*pair, TEXTS)
    assert check_effect(*pair, TEXTS, written=["a"]) == alone
    assert check_effect(*pair, ["a"], written=TEXTS) == check_effect(*pair, (), written=TEXTS)


def move_in(folder, method, texts) -> jcl.TransferSettings:
    """Of a random adapter between two tiny bases, all written to the folder, with the texts as probe text."""
    source = write_base(folder / "source", 90, bos=True, layers=2)
    write_base(folder / "target", 90, bos=True, layers=2, hidden=32, head_dim=8, seed=1)
    (folder / "texts.txt").write_text("\n".join(texts))
    jcl.save_adapter(random_adapter(jcl.open_base(source), rank=2, scale=0.1), folder / "adapter")
    places = [str(folder / name) for name in ("adapter", "source", "target", "out")]
    return transfer_settings(*places, method=method, prompts=str(folder / "texts.txt"), cache=False)


def test_transfer_with_too_short_texts_warns_and_measures_no_effect(tmp_path, monkeypatch):
    given = move_in(tmp_path, "theseus", ["Water", "Anna", "Peter", "Plants"])
    monkeypatch.setattr("jcrosslora.session.conclusion.adapter_texts", lambda *_, **__: [])
    report = transfer_files(given).report
    assert report.effect is None
    assert report.warnings[-1].startswith("the effect was not measured: no text has two positions")
    with pytest.raises(UsageError, match="no text has two positions"):
        transfer_files(dataclasses.replace(given, effect="always", out=str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()


def test_unknown_effect_setting_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match="effect is 'sometimes'; expected 'auto', 'always', 'never'"):
        transfer_settings("adapter", "source", "target", str(tmp_path / "out"), effect="sometimes")


def test_large_sets_of_texts_are_sampled_evenly():
    texts = [str(number) for number in range(100)]
    chosen = pick_evenly(texts, effect_module.TEXTS)
    assert (chosen[0], chosen[-1], len(chosen)) == ("0", "99", effect_module.TEXTS)
    assert set(np.diff(np.array(chosen, int))) == {9}


def change(kl, growth=0.0):
    return Change(kl, 0.1, 4.0, 4.0 + growth)


def made(share, excess, error=0.01):
    changes = change(0.2), change(0.2 * share, excess)
    return Effect.of(changes, (excess, error), texts=12, positions=700, written=True)


@pytest.mark.parametrize(
    ("share", "excess", "error", "outcome"),
    [
        (1, -0.1, 0.01, "plausible"),
        (0.04, 0, 0.01, "ineffective"),
        (4, 0.33, 0.01, "plausible"),
        (6, -0.1, 0.01, "destructive"),
        (1, 0.35, 0.01, "destructive"),
        (1, 0.5, 0.3, "plausible"),  # within two standard errors
        (0.01, 0.5, 0.01, "destructive"),
    ],
)
def test_outcome_changes_at_its_bounds(share, excess, error, outcome):
    assert made(share, excess, error).outcome == outcome


def test_adapter_texts_are_written_with_the_adapter(pair, monkeypatch):
    source, adapter = pair[0]
    texts = adapter_texts(source, adapter, seed=3)
    assert len(set(texts)) == effect_module.TEXTS

    def none(*args, **kwargs):
        msg = "too few"
        raise MethodError(msg)

    monkeypatch.setattr(effect_module, "write_texts", none)
    assert adapter_texts(source, adapter) == []


@pytest.fixture(scope="module")
def report(pair):
    (source, adapter), (target, _) = pair
    return jcl.shift(jcl.align(source, target, method="pad-truncate"), adapter).report


def test_report_without_an_effect_does_not_mention_it(report):
    shown = published(report)
    assert json.loads(documents(shown, "portable")[REPORT])["effect"] is None
    assert "Effect on text" not in model_card(shown)
    assert "chosen because" not in model_card(shown)


@pytest.mark.parametrize(("share", "level"), [(0.01, "ineffective"), (9, "destructive"), (1, None)])
def test_effect_appears_in_verdict_json_card_and_table(report, share, level):
    effect = made(share, 0)
    full = complete(msgspec.structs.replace(report, effect=effect, choice="the bases differ"), PadTruncate())
    found = jcl.verdict(full)
    assert found.level == (level or jcl.verdict(report).level)
    assert found.text.endswith(full.effect.sentence)
    shown = published(full)
    data = json.loads(documents(shown, "portable")[REPORT])
    assert data["effect"]["outcome"] == full.effect.outcome
    assert data["choice"] == "the bases differ"
    card = model_card(shown)
    assert "## Effect on text" in card
    assert "`pad-truncate`, chosen because the bases differ." in card
    console = Console(file=io.StringIO(), width=200)
    print_report(full, console)
    printed = console.file.getvalue()
    assert "method: pad-truncate, because the bases differ" in printed
    assert "effect: base target, KL" in printed


def test_random_control_keeps_its_verdict(pair, report):
    recipe = dataclasses.replace(report.recipe, method="random")
    full = msgspec.structs.replace(report, recipe=recipe, effect=made(0.01, 0))
    assert jcl.verdict(complete(full, Random())).level == "control"
