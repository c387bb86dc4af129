"""Draft models: what greedy speculative decoding accepts of them, alone and with adapters."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from command_line import main
from probe_bases import write_base
from tiny_bases import random_adapter
from tiny_models import torch, transformers

import jcrosslora as jcl
from jcrosslora.adapter import save_adapter
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Acceptance, intervals

PROMPTS = ["The quick brown fox", "Water boils at", "Anna and Peter", "Plants need water, light and", "Where is Köln"]
ANSWER = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return jcl.open_base(write_base(tmp_path_factory.mktemp("base"), 60, eos=[*range(3, 300, 25)], layers=2))


@pytest.fixture(scope="module")
def adapters(base):
    return [random_adapter(base, seed=seed, scale=scale) for seed, scale in ((1, 0.15), (2, 0.05))]


def torch_model(base, adapter):
    """The base in transformers, with an adapter merged."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, factors in ({} if adapter is None else adapter.modules).items():
            model.get_submodule(name).weight += torch.from_numpy(factors.scale * factors.b @ factors.a)
    return model


def speculate(target, draft, prompt, drafted, stops):
    """Speculative decoding as in its paper: the tokens that two torch models write, and the target's passes."""
    written, passes = [], 0

    def likeliest(model, tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()

    while len(written) < ANSWER and not {*written} & {*stops}:
        proposed = []
        for _ in range(drafted):
            proposed.append(likeliest(draft, [*prompt, *written, *proposed])[-1])
        wanted = likeliest(target, [*prompt, *written, *proposed])[len(prompt) + len(written) - 1 :]
        right = next((place for place in range(drafted) if proposed[place] != wanted[place]), drafted)
        written, passes = [*written, *wanted[: right + 1]], passes + 1
    ends = [place + 1 for place, token in enumerate(written) if token in stops]
    return written[: min(ANSWER, *ends[:1], len(written))], passes


@pytest.mark.parametrize("drafted", [1, 4])
def test_passes_are_those_of_a_loop_of_speculative_decoding(base, adapters, drafted):
    found = jcl.judge_draft(base, base, PROMPTS, adapters[0], adapters, drafted=drafted, max_new_tokens=ANSWER)
    tokenizer = load_tokenizer(base)
    prompts = [tokenizer.encode(text).ids.tolist() for text in PROMPTS]
    models = [torch_model(base, adapter) for adapter in (None, *adapters)]
    for row, draft in zip(found.passes(), models, strict=True):
        ran = [speculate(models[1], draft, prompt, drafted, tokenizer.stops) for prompt in prompts]
        assert [len(one) for one, _ in ran] == [one.shape[1] for one in found.predicted]
        assert row.tolist() == [passes for _, passes in ran]
    assert len({len(one[0]) for one in found.predicted}) > 1  # some of them ended
    assert 0 < found.figures()[0].acceptance_rate.value < 1


@pytest.mark.full
def test_passes_are_those_of_assisted_generation(base, adapters):
    target, draft = (torch_model(base, adapter) for adapter in (adapters[0], None))
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = 4, "constant"
    settings.assistant_confidence_threshold = 0.0
    found = jcl.judge_draft(base, base, PROMPTS, adapters[0], max_new_tokens=ANSWER)
    passes, forward = [], target.forward

    def counted(*args, **kwargs):
        passes[-1] += 1
        return forward(*args, **kwargs)

    target.forward = counted
    for text in PROMPTS:
        passes.append(0)
        ids = torch.tensor([load_tokenizer(base).encode(text).ids.tolist()])
        target.generate(ids, assistant_model=draft, do_sample=False, max_new_tokens=ANSWER, pad_token_id=0)
    assert found.passes()[0].tolist() == passes


def test_the_target_is_a_draft_of_which_all_is_accepted(base, adapters):
    found = jcl.judge_draft(base, base, PROMPTS, adapters[0], adapters[:1], drafted=3, max_new_tokens=ANSWER)
    assert found.names == (public_name(base.name), adapters[0].info.name)
    own = found.figures()[1]
    assert own.acceptance_rate.low == 1
    assert found.passes()[1].tolist() == [math.ceil(one.shape[1] / 4) for one in found.predicted]
    assert found.cost == 1
    assert own.estimated_speed_up == pytest.approx(own.acceptance_length.value / 4)


def test_figures_equal_those_computed_by_hand():
    alone = [[True, False, True, True, True, False], [False] * 4]  # passes of 2 and 4 tokens with 3 drafted; of 1
    moved = [[True] * 6, [True, True, False, True]]  # 4 and 2; 3 and 1
    found = Acceptance(("draft", "moved"), tuple(map(np.array, zip(alone, moved, strict=True))), 3, 0.25)
    assert found.tokens == 10
    assert found.passes().tolist() == [[2, 4], [2, 2]]
    own, other = found.figures()
    assert (own.acceptance_rate.value, other.acceptance_rate.value) == (0.4, 0.9)
    assert (own.acceptance_length.value, other.acceptance_length.value) == (10 / 6, 10 / 4)
    assert other.minus_alone.value == pytest.approx(10 / 4 - 10 / 6)
    assert (own.estimated_speed_up, other.estimated_speed_up) == pytest.approx((10 / 6 / 1.75, 10 / 4 / 1.75))


def test_intervals_are_over_prompts():
    rng = np.random.default_rng(0)
    predicted = tuple(rng.random((2, 5)) < [[0.5], [0.7]] for _ in range(80))
    found, shares = Acceptance(("draft", "moved"), predicted, 4, 0.5), np.mean(predicted, axis=2).T
    figures = found.figures()
    for one, wanted in zip(figures, intervals(shares), strict=True):  # answers of one length
        rate = one.acceptance_rate
        assert (rate.value, rate.low, rate.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
    assert figures[1].minus_alone.low > 0
    assert figures[0].minus_alone.high == 0


# The command


@pytest.fixture(scope="module")
def files(base, adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "data.jsonl").write_text("".join(f'{{"prompt": "{one}", "answer": "x"}}\n' for one in PROMPTS))
    for name, adapter in zip(("own", "moved"), adapters, strict=True):
        save_adapter(adapter, folder / name, base_name="org/base")
    return folder


def command(base, files, *more):
    given = "--base", base.path, "--draft", base.path, "--data", files / "data.jsonl", "--max-new-tokens", ANSWER, *more
    return main(["evaluate", *map(str, given)])


def refused(capsys, base, files, *more):
    with pytest.raises(SystemExit) as ended:
        command(base, files, *more)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_the_command_prints_the_figures_of_python(base, files, adapters, capsys):
    both = "--adapter", files / "own", "--draft-adapter", files / "moved", "--limit", 3, "--drafted", 2
    command(base, files, *both, "--json")
    found = json.loads(capsys.readouterr().out)
    wanted = jcl.judge_draft(base, base, PROMPTS[:3], *adapters[:1], adapters[1:], drafted=2, max_new_tokens=ANSWER)
    assert (found["answers"], found["tokens"], found["drafted"]) == (3, wanted.tokens, 2)
    assert [one | {"name": ""} for one in found["drafts"]] == [asdict(one) | {"name": ""} for one in wanted.figures()]
    command(base, files, *both)
    shown = capsys.readouterr().out
    assert f"3 answers of {wanted.tokens} tokens" in shown
    for one in (one.acceptance_length for one in wanted.figures()):
        assert f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" in shown


def test_another_vocabulary_is_refused_by_name(base, files, tmp_path, capsys):
    other = write_base(tmp_path / "other", 40, layers=2)
    with pytest.raises(UsageError, match=r"cannot draft for .*: 20 token ids differ, such as 298, which is '' in the"):
        jcl.judge_draft(base, other, PROMPTS)
    assert "need one vocabulary" in refused(capsys, base, files, "--draft", other)


@pytest.mark.parametrize(
    ("more", "came"),
    [
        (("--drafted", "0"), "0 tokens drafted"),
        (("--show", "2"), "--show is not for --draft"),
        (("--adapter", "a", "b"), "--adapter names 2 adapters"),
    ],
)
def test_what_does_not_go_with_a_draft_is_refused(base, files, capsys, more, came):
    assert came in refused(capsys, base, files, *more)


def test_flags_of_a_draft_need_one(base, files, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--base", str(base.path), "--data", str(files / "data.jsonl"), "--drafted", "2"])
    assert "--drafted is not for --data: leave it out, or give a --draft" in capsys.readouterr().err
