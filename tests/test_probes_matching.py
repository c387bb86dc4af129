"""Matched positions and batches, checked by brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jcrosslora.checkpoint import Encoded, Tokenizer
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.probes import count_positions, match_positions, probe_batches


class PieceTokenizer(Tokenizer):
    """Tokens of `size` characters; with bos, and with every third token ending inside a character, if asked for."""

    def __init__(self, size, bos=None, ragged=False, eos=None):
        super().__init__(bos=bos, stops=(), vocab=1_000_000, ref="pieces", backend=(size, ragged), eos=eos)

    def encode(self, text, *, special=True):
        size, ragged = self.backend
        ends = [min(start + size, len(text)) for start in range(0, len(text), size)]
        ids = [1000 * size + end for end in ends]
        if ragged:
            ends = [-1 if place % 3 == 2 else end for place, end in enumerate(ends)]
        if self.bos is not None:
            ids, ends = [self.bos, *ids], [0, *ends]
        return Encoded(np.array(ids, np.int32), np.array(ends, np.int32))


@st.composite
def token_ends(draw):
    """Ends as a tokenizer gives them: rising, some repeated, some -1, zeros in front."""
    steps = draw(st.lists(st.integers(0, 3), max_size=30))
    inside = draw(st.lists(st.booleans(), min_size=len(steps), max_size=len(steps)))
    ends = np.where(inside, -1, np.cumsum(steps, dtype=np.int64)).astype(np.int32)
    return Encoded(np.arange(len(ends), dtype=np.int32), ends)


@given(token_ends(), token_ends())
def test_matches_are_the_first_tokens_that_end_at_each_shared_character(src, tgt):
    at_src, at_tgt = match_positions(src, tgt)
    left, right = src.ends.tolist(), tgt.ends.tolist()
    shared = sorted({end for end in left if end > 0 and end in right})
    assert at_src.tolist() == [left.index(end) for end in shared]
    assert at_tgt.tolist() == [right.index(end) for end in shared]
    for found in (at_src, at_tgt):
        assert np.all(np.diff(found) > 0)


def test_matching_is_symmetric():
    src, tgt = PieceTokenizer(2).encode("abcdefghijkl"), PieceTokenizer(3, bos=1).encode("abcdefghijkl")
    assert [at.tolist() for at in match_positions(src, tgt)] == [[2, 5], [2, 4]]
    assert [at.tolist() for at in match_positions(tgt, src)] == [[2, 4], [2, 5]]


def pairs_by_brute_force(texts, tok_src, tok_tgt, length):
    """(source token, target token) of all wanted matches: the tokens' numbers tell where they are."""
    found = []
    for text in texts:
        src, tgt = tok_src.encode(text), tok_tgt.encode(text)
        for i in range(1, min(length, len(src.ids))):
            for j in range(1, min(length, len(tgt.ids))):
                if src.ends[i] == tgt.ends[j] > 0:
                    found.append((src.ids[i], tgt.ids[j]))
    return sorted(found)


def pairs_of(batches):
    return sorted(
        (src, tgt)
        for batch in batches
        for src, tgt in zip(
            batch.tokens_src.ravel()[batch.at_src[batch.valid]],
            batch.tokens_tgt.ravel()[batch.at_tgt[batch.valid]],
            strict=True,
        )
    )


TEXTS = ["x" * length for length in (90, 7, 31, 55, 54, 12, 3, 77, 160, 21)]
TOKENIZERS = [
    (PieceTokenizer(2), PieceTokenizer(3, bos=1)),
    (PieceTokenizer(4, bos=1), PieceTokenizer(2, ragged=True)),
    (PieceTokenizer(1), PieceTokenizer(1)),
]


@pytest.mark.parametrize(("tok_src", "tok_tgt"), TOKENIZERS)
@pytest.mark.parametrize("length", [20, 128])
def test_batches_have_all_matches_except_at_the_first_position(tok_src, tok_tgt, length):
    batches = probe_batches(TEXTS, (tok_src, tok_tgt), length=length, batch=4)
    wanted = pairs_by_brute_force(TEXTS, tok_src, tok_tgt, length)
    assert pairs_of(batches) == wanted
    assert count_positions(batches) == len(wanted)


@pytest.mark.parametrize(("tok_src", "tok_tgt"), TOKENIZERS)
@pytest.mark.parametrize("positions", [None, 50, 400])
def test_all_batches_have_the_same_shape(tok_src, tok_tgt, positions):
    batches = probe_batches(TEXTS, (tok_src, tok_tgt), length=64, batch=4, positions=positions)
    shapes = {tuple((name, getattr(one, name).shape) for name in vars(one)) for one in batches}
    assert len(shapes) == 1
    sizes = dict(shapes.pop())
    rows, width = sizes["tokens_src"]
    assert rows == 4
    assert width % 8 == 0
    assert width <= 64
    assert {sizes[name] for name in ("mask_src", "tokens_tgt", "mask_tgt")} == {(4, width)}
    places = sizes["valid"][0]
    assert sizes["at_src"] == sizes["at_tgt"] == (places,)
    assert places == positions if positions else places - max(one.valid.sum() for one in batches) < 8
    for one in batches:
        assert {one.tokens_src.dtype, one.at_src.dtype, one.at_tgt.dtype} == {np.dtype(np.int32)}
        assert one.mask_src.ravel()[one.at_src[one.valid]].all()
        assert one.mask_tgt.ravel()[one.at_tgt[one.valid]].all()
        assert np.all(np.diff(one.at_src[one.valid]) > 0)
        assert not one.at_src[~one.valid].any()
        assert not one.at_tgt[~one.valid].any()


def test_batch_with_too_many_matches_keeps_some_of_every_text():
    tok_src, tok_tgt = TOKENIZERS[0]
    (whole,) = probe_batches(TEXTS, (tok_src, tok_tgt), batch=len(TEXTS))
    (thinned,) = probe_batches(TEXTS, (tok_src, tok_tgt), batch=len(TEXTS), positions=60)
    assert thinned.valid.all()
    assert len(set(thinned.at_src.tolist())) == 60
    assert set(pairs_of([thinned])) < set(pairs_of([whole]))
    width = whole.tokens_src.shape[1]
    assert len(set((thinned.at_src // width).tolist())) >= 7


def test_tokens_after_the_last_match_are_dropped_and_long_texts_come_first():
    tok_src, tok_tgt = PieceTokenizer(2), PieceTokenizer(3)
    batches = probe_batches(TEXTS, (tok_src, tok_tgt), batch=3)
    lengths = [int(row.sum()) for one in batches for row in one.mask_src if row.any()]
    assert lengths == sorted(lengths, reverse=True)
    # 160 characters end in 54 tokens of 3; the last match is at 156, or at the end where both stop.
    assert lengths[0] == 80
    (alone,) = probe_batches(["x" * 27], (PieceTokenizer(2), PieceTokenizer(5, ragged=True)), batch=1)
    assert alone.mask_src.sum() * 2 == 20
    assert alone.mask_tgt.sum() * 5 == 20


def test_texts_without_a_match_are_dropped():
    tok_src, tok_tgt = PieceTokenizer(2), PieceTokenizer(3)
    (one,) = probe_batches(["x", "xx" * 9, ""], (tok_src, tok_tgt), batch=3)
    assert one.mask_src.any(axis=1).tolist() == [True, False, False]
    assert one.mask_tgt.any(axis=1).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("texts", "sizes", "named"),
    [
        ([], {}, "no probe text"),
        (["x"], {}, "no probe text"),
        (["x" * 9], {"length": 0}, "length=0"),
        (["x" * 9], {"batch": 0}, "batch=0"),
        (["x" * 9], {"positions": 0}, "positions=0"),
    ],
)
def test_texts_without_any_match_are_refused(texts, sizes, named):
    with pytest.raises(UsageError) as caught:
        probe_batches(texts, (PieceTokenizer(2), PieceTokenizer(3)), **sizes)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
