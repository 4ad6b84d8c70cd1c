"""Prompts to ids, and prompts that cannot be read."""

from __future__ import annotations

import pytest

from asd_rt.errors import PromptError
from asd_rt.tokenizer import tokenize

WORDS = {
    "red": 1,
    "blue": 2,
    "three": 3,
    "3": 3,
    "right": 4,
    "up": 5,
    "a": 0,
    "moving": 0,
    "and": 0,
}


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a red three moving right", [1, 3, 4, 0]),
        ("  A RED, three -- moving\nright!! ", [1, 3, 4, 0]),
        ("red 3", [1, 3, 0, 0]),
        ("up_right", [5, 4, 0, 0]),
    ],
)
def test_reads(prompt, ids) -> None:
    tokens = tokenize(prompt, WORDS, 4)
    assert tokens.dtype == "int64"
    assert tokens.tolist() == [ids]


@pytest.mark.parametrize("prompt", ["", "   ", "?!", "a moving", "and and and"])
def test_says_nothing(prompt) -> None:
    with pytest.raises(
        PromptError, match="nothing to draw; this engine knows: red, blue, three, 3"
    ):
        tokenize(prompt, WORDS, 4)


def test_unknown_words_are_named_with_the_vocabulary() -> None:
    with pytest.raises(PromptError) as caught:
        tokenize("a purple cow, a purple three", WORDS, 4)
    message = str(caught.value)
    assert "unknown words purple, cow;" in message
    assert all(word in message for word in WORDS)
    assert "\n" not in message


def test_too_many_words() -> None:
    with pytest.raises(PromptError, match=r"5 words that count.*at most 4"):
        tokenize("red blue three right up", WORDS, 4)


def test_no_text() -> None:
    with pytest.raises(PromptError, match="must be text"):
        tokenize(None, WORDS, 4)  # type: ignore[arg-type]
