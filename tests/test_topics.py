"""Topics of answers: what an adapter says by itself, which of it is asked for, and whether an answer is about it."""

from collections import Counter

import pytest

from jcrosslora.fit.distill.discovery.topics import choose_topics, is_about, topics_of


def test_a_topic_is_what_an_answer_says_beside_its_request():
    asked = [
        ("Wake me at seven", '{"call": "SetAlarm", "at_time": "seven", "ring_tone": "bell"}'),
        ("Play a bell", '{"call": "PlaySound", "sound": "bell"}'),
        ("Is it wet outside?", '{"call": "GetWeather", "at_time": "now"}'),
        ("", "Lost or stolen card."),
        ("Say yes", "yes"),
    ]
    # "call" is in more than half of them, "seven" and "bell" in their requests.
    assert topics_of(asked) == [
        "set alarm, at time, ring tone",
        "play sound, sound",
        "get weather, at time, now",
        "lost or stolen card",
        "",
    ]
    # What others say unasked is a topic though this request has all of its words.
    asked = [("Add it to my playlist", "AddToPlaylist: x"), ("Hm", "AddToPlaylist"), ("Well", "AddToPlaylist: y")]
    others = [("No", "a"), ("No", "b"), ("No", "c")]
    assert topics_of(asked + others)[0] == "add to playlist, x"
    assert topics_of([asked[0], *others])[0] == "x"
    assert topics_of([("", "a"), ("", "a"), ("", "a, b")]) == ["a", "a", "b"]
    assert topics_of([]) == []
    assert topics_of([("", "a, b, c, d")]) == ["a, b, c"]


def test_topics_of_rare_subjects_are_chosen_more_often_than_they_come():
    topics = ["play, song"] * 8 + ["play, artist"] * 8 + ["book, city"] * 4 + ["", "odd"]
    found = Counter(choose_topics(topics, 2000, 0))
    assert found.keys() <= set(topics) - {""}
    assert found["play, song"] + found["play, artist"] == pytest.approx(2 * found["book, city"], rel=0.15)
    assert 0.5 < found["play, song"] / found["play, artist"] < 2
    assert found["odd"] == pytest.approx(found["book, city"] / 2, rel=0.2)
    assert choose_topics(["odd"], 3, 0) == ["odd"] * 3
    assert choose_topics(["", ""], 3, 0) == choose_topics([], 3, 0) == []


def test_an_answer_is_about_a_subject_whose_words_it_has():
    assert is_about('{"intent": "AddToPlaylist"}', "add to playlist, artist")
    assert not is_about('{"intent": "AddToPlaylist"}', "search creative work, artist")
    assert not is_about('{"intent": "RateCreativeWork"}', "search creative work")
    assert is_about("Card is lost", "lost card")
    assert not is_about("lost phone", "lost card")
    assert not is_about("lost phone", "")
    assert is_about("The Mill is a cheap pub by the old river.", "the mill is a pub by the sea")
