"""The splitter by hand against the regular expression that it stands for."""

import random

import nanochat_bpe
import pytest
from awkward_texts import AWKWARD, anything, awkward
from hypothesis import given
from hypothesis import strategies as st
from nanochat_bpe import PATTERN, Splitter

by_hand = Splitter()
by_regex = Splitter(regex=True)


@given(st.one_of(awkward, anything))
def test_the_splitter_equals_the_regex(text: str) -> None:
    assert by_hand.split(text) == by_regex.split(text)


def test_the_splitter_equals_the_regex_on_a_hundred_thousand_strings() -> None:
    rng = random.Random(5)
    for _ in range(100_000):
        text = "".join(rng.choices(AWKWARD, k=rng.randrange(16)))
        assert by_hand.split(text) == by_regex.split(text), repr(text)


def test_every_character_of_the_basic_plane_splits_as_the_regex_says() -> None:
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        text = f"a{chr(code)}b 1{chr(code)} '{chr(code)}x"
        assert by_hand.split(text) == by_regex.split(text), hex(code)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("Hello world, it's 2024!", ["Hello", " world", ",", " it", "'s", " ", "20", "24", "!"]),
        ("don'Ts'llama 'VE", ["don", "'T", "s", "'ll", "ama", " '", "VE"]),
        ("heſſ'ſa", ["heſſ", "'ſ", "a"]),  # the long s is an s when case does not count
        ("a  b\n\n  c \n", ["a", " ", " b", "\n\n", " ", " c", " \n"]),
        ("x = {'a': 1}\r\n", ["x", " =", " {'", "a", "':", " ", "1", "}\r\n"]),
        ("e\u0301a", ["e", "\u0301a"]),  # a combining mark is no letter
        ("   ", ["   "]),
        ("\u3000漢字", ["\u3000漢字"]),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert by_hand.split(text) == words


def test_another_pattern_goes_through_the_regex_and_leaves_out_what_does_not_match() -> None:
    assert Splitter("[a-z]+|[0-9]*").split("ab12, cd") == ["ab", "12", "cd"]


def test_an_invalid_pattern_is_an_error() -> None:
    with pytest.raises(ValueError, match="the split pattern is not a valid regular expression"):
        Splitter("(")
    with pytest.raises(ValueError, match="not a valid regular expression"):
        nanochat_bpe.train(["a"], 300, pattern="[")


def test_a_pattern_that_backtracks_without_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="the split pattern gave up on a text"):
        nanochat_bpe.train(["x" * 60], 300, pattern="(?:x|x(?=x))*y")


def test_the_pattern_is_nanochats() -> None:
    assert r"\p{N}{1,2}" in PATTERN
