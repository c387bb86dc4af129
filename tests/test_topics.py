"""Topics of answers: what an adapter says by itself, which of it is asked for, and whether an answer is about it."""

from collections import Counter

import pytest

from jcrosslora.distill.task_search.topics import choose_topics, doubted_subjects, is_about, parts_of, topic_of


def topics_of(asked):
    return [topic_of(parts) for parts in parts_of(asked)]


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


def shares(parts, doubted=()):
    """The shares of the subjects in many topics."""
    found = Counter(topic.split(", ")[0] for topic in choose_topics(parts, 4000, 0, doubted))
    return {subject: count / 4000 for subject, count in found.items()}


def test_subjects_that_are_not_doubted_are_chosen_alike_and_all_of_them_sometimes():
    parts = [["play", "song"]] * 9 + [["book", "city"]] * 4 + [[], ["odd"]]
    # A quarter goes by the roots of how often they come: 3, 2 and 1.
    assert shares(parts) == pytest.approx({"play": 0.375, "book": 1 / 3, "odd": 0.25 + 1 / 24}, abs=0.025)
    assert shares(parts, {"play"}) == pytest.approx({"play": 0.125, "book": 11 / 24, "odd": 10 / 24}, abs=0.025)
    assert shares(parts, {"play", "book", "odd"}) == pytest.approx(
        {"play": 0.5, "book": 1 / 3, "odd": 1 / 6}, abs=0.025
    )
    assert choose_topics([["odd"]], 3, 0) == ["odd"] * 3
    assert choose_topics([[], []], 3, 0) == choose_topics([], 3, 0) == []


def test_a_topic_has_at_most_two_other_parts_of_one_answer():
    found = Counter(choose_topics([["play", "song", "artist", "year"], ["play", "now"]], 3000, 0))
    pairs = {"play, song, artist", "play, song, year", "play, artist, year"}
    assert found.keys() == {"play", "play, now", "play, song", "play, artist", "play, year"} | pairs
    # Nothing in a third of them, one in a third; the second answer has but one.
    assert found["play"] == pytest.approx(1000, rel=0.1)
    assert found["play, now"] == pytest.approx(1000, rel=0.1)
    assert sum(found[pair] for pair in pairs) == pytest.approx(500, rel=0.15)
    assert max(found[pair] for pair in pairs) < 1.4 * min(found[pair] for pair in pairs)


def test_a_subject_is_doubted_that_no_request_about_it_was_answered_by():
    about = {"Sing!": "play song, year", "Eat": "book table", "Dine": "book table", "Go": "go home", "Rest": ""}
    answered = [
        ("Sing!", '{"call": "PlaySongs"}'),
        ("Eat", "GetWeather"),
        ("Dine", '{"call": "BookTable"}'),
        ("Rest", "PlaySong"),
        ("Play", "PlaySong"),
    ]
    assert doubted_subjects(answered, about) == {"play song"}
    assert doubted_subjects([], about) == set()


def test_an_answer_is_about_a_subject_whose_words_it_has():
    assert is_about('{"intent": "AddToPlaylist"}', "add to playlist, artist")
    assert not is_about('{"intent": "AddToPlaylist"}', "search creative work, artist")
    assert not is_about('{"intent": "RateCreativeWork"}', "search creative work")
    assert is_about("Card is lost", "lost card")
    assert not is_about("lost phone", "lost card")
    assert not is_about("lost phone", "")
    assert is_about("The Mill is a cheap pub by the old river.", "the mill is a pub by the sea")
