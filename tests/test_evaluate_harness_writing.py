"""Text that the model class writes for lm-evaluation-harness, against the harness's own torch model."""

import json
import shutil

import pytest
from harness_models import PROMPT, adapter_of, requests, torch_lm, write_tiny, written_tokens

from jcrosslora.errors import UsageError
from jcrosslora.evaluate.harness import JCrossLoRALM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("folder"), "byte-level")


def test_generation_ends_at_stop_strings_as_in_the_harness(folder):
    ours, theirs = JCrossLoRALM(folder, adapter_of(folder)), torch_lm(folder, adapter_of(folder))
    length = {"max_gen_toks": 40, "do_sample": False}
    (text,) = theirs.generate_until(requests("generate_until", [(PROMPT, length)]), disable_tqdm=True)
    readable = [text[start : start + size] for size in (1, 2) for start in range(0, len(text) - 1, 3)]
    stops = [[stop] for stop in dict.fromkeys(readable) if "\ufffd" not in stop]
    assert len(stops) > 5
    asked = [(PROMPT, length | {"until": until}) for until in [*stops, [], stops[3] + stops[0], ["nowhere"]]]
    asked += [("the star", {"max_gen_toks": 40, "until": stops[0]}), ("", {"max_gen_toks": 40, "until": stops[1]})]
    # The harness's model cannot write without a prompt: it gets the bos that ours puts there.
    given = [(context or "<s>", options) for context, options in asked]
    found = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == theirs.generate_until(requests("generate_until", given), disable_tqdm=True)
    assert len(set(map(len, found))) > 5


def test_generation_ends_at_eos_and_at_names_of_special_tokens(folder, tmp_path):
    theirs = torch_lm(folder, adapter_of(folder))
    written = written_tokens(theirs, theirs.tok_encode(PROMPT), 40)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = {index: name for name, index in tokenizer["model"]["vocab"].items()}
    place = next(place for place, token in enumerate(written) if place and names[token] in "!#$%&{|}~^@VZXNMF")
    wanted = theirs.tokenizer.decode(written[:place])
    changed = shutil.copytree(folder, tmp_path / "eos")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"eos_token_id": written[place]}))
    asked = requests("generate_until", [(PROMPT, {"max_gen_toks": 40})])
    assert JCrossLoRALM(changed, adapter_of(folder)).generate_until(asked, disable_tqdm=True) == [wanted]
    # The same token as a special one, which the text would not show.
    name = names[written[place]]
    special = {"id": written[place], "content": name, "special": True, "normalized": False}
    sides = {"single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append(special | sides)
    marked = shutil.copytree(folder, tmp_path / "special")
    (marked / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = requests("generate_until", [(PROMPT, {"max_gen_toks": 40, "until": [name]})])
    assert JCrossLoRALM(marked, adapter_of(folder)).generate_until(asked, disable_tqdm=True) == [wanted]


def test_generation_goes_on_after_a_turn_that_the_files_do_not_state_as_an_end(folder, tmp_path):
    theirs = torch_lm(folder, adapter_of(folder))
    written = written_tokens(theirs, theirs.tok_encode(PROMPT), 40)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = {index: name for name, index in tokenizer["model"]["vocab"].items()}
    turn = next(token for token in written[1:] if names[token] in "!#$%&{|}~^@VZXNMF")
    end = {"id": turn, "content": "<|im_end|>", "special": True, "normalized": False}
    tokenizer["added_tokens"].append(end | {"single_word": False, "lstrip": False, "rstrip": False})
    tokenizer["model"]["vocab"]["<|im_end|>"] = tokenizer["model"]["vocab"].pop(names[turn])
    changed = shutil.copytree(folder, tmp_path / "turns")
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = requests("generate_until", [(PROMPT, {"max_gen_toks": 40})])
    (text,) = JCrossLoRALM(changed, adapter_of(folder)).generate_until(asked, disable_tqdm=True)
    assert [text] == torch_lm(changed, adapter_of(folder)).generate_until(asked, disable_tqdm=True)
    (changed / "generation_config.json").write_text(json.dumps({"eos_token_id": turn}))
    (ended,) = JCrossLoRALM(changed, adapter_of(folder)).generate_until(asked, disable_tqdm=True)
    assert [ended] == torch_lm(changed, adapter_of(folder)).generate_until(asked, disable_tqdm=True)
    assert len(ended) < len(text)


def test_sampled_texts_follow_the_seed(folder):
    asked = requests("generate_until", [(PROMPT, {"max_gen_toks": 40, "do_sample": True, "temperature": 1.0})] * 2)
    lms = [JCrossLoRALM(folder, adapter_of(folder), seed=seed, batch_tokens=1) for seed in (0, 0, 1)]
    one, again, other = (lm.generate_until(asked, disable_tqdm=True) for lm in lms)
    assert one == again
    assert len({*one, *other}) == 4


def test_a_seed_of_more_than_32_bits_is_refused(folder):
    with pytest.raises(UsageError, match="seed 4294967296 was asked for"):
        JCrossLoRALM(folder, seed=1 << 32)
