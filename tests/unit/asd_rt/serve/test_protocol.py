"""Control messages: what is taken, and one line for what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_rt.serve.protocol import TYPES, Message, MessageError, Reader, pack_block, unpack_block

READER = Reader(prompt_chars=20, clip_frames=48)


def test_a_start_with_everything() -> None:
    text = json.dumps(
        {
            "type": "start",
            "prompt": "a red three",
            "seed": 3,
            "steps": 2,
            "first_steps": 4,
            "deadline_ms": 40,
            "fps": 24,
            "upload": "abc",
        }
    )
    found = READER.message(text)
    assert (found.type, found.prompt, found.upload) == ("start", "a red three", "abc")
    assert (found.settings.seed, found.settings.steps, found.settings.deadline_ms) == (3, 2, 40.0)
    assert found.given == {"seed", "steps", "first_steps", "deadline_ms", "fps"}


def test_a_prompt_may_ask_for_a_recache() -> None:
    assert READER.message('{"type": "prompt", "prompt": "red", "recache": true}').recache
    assert not READER.message('{"type": "prompt", "prompt": "red"}').recache
    with pytest.raises(MessageError, match="recache must be true or false, found 1"):
        READER.message('{"type": "prompt", "prompt": "red", "recache": 1}')


def test_a_deadline_can_be_taken_away() -> None:
    found = READER.message('{"type": "set", "deadline_ms": null}')
    assert found.settings.deadline_ms is None
    assert found.given == {"deadline_ms"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ("[" * 15_000, "must be a JSON object"),
        ("9" * 10_000, "must be a JSON object"),
        ('{"type": "pause", "type": "pause"}', "comes twice"),
        ('{"prompt": "x"}', "type must be one of start"),
        ('{"type": {}}', "type must be one of start"),
        ('{"type": "start"}', "prompt is missing"),
        ('{"type": "prompt", "prompt": "   "}', "text of 1 to 20"),
        ('{"type": "prompt", "prompt": "' + "x" * 21 + '"}', "found 21 characters"),
        ('{"type": "pause", "for": 3}', "unknown for; it takes nothing"),
        ('{"type": "set", "steps": 5}', "whole number from 1 to 4, found 5"),
        ('{"type": "set", "steps": true}', "found True"),
        ('{"type": "set", "steps": 2.0}', "found 2.0"),
        ('{"type": "set", "deadline_ms": NaN}', "NaN is no JSON"),
        ('{"type": "set", "deadline_ms": 1e999}', "found inf"),
        ('{"type": "set", "deadline_ms": -1}', "found -1"),
        ('{"type": "set", "fps": 1' + "0" * 400 + "}", "from 1 to 120"),
        ('{"type": "set", "fps": 1000}', "from 1 to 120"),
        ('{"type": "reset", "seed": -1}', "found -1"),
        ('{"type": "ack", "block": "1"}', "found 1"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(MessageError, match=r"^[^\n]{1,300}$") as refused:
        READER.message(text)
    assert said in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    sorted({"type", "deadline_ms", *(f for t in TYPES.values() for s in t for f in s)})
)


@given(st.dictionaries(FIELDS, JSON | st.sampled_from(sorted(TYPES)), max_size=6) | JSON)
def test_anything_is_a_message_or_one_line(value: Any) -> None:
    try:
        found = READER.message(json.dumps(value))
    except MessageError as error:
        line = str(error)
        assert len(line) < 400
        assert line.isprintable()
    else:
        assert isinstance(found, Message)
        assert found.type in TYPES


def test_blocks_come_back_as_they_went() -> None:
    images = [b"one", b"", b"three"]
    header, back = unpack_block(pack_block({"block": 4}, images))
    assert (header["block"], header["sizes"], back) == (4, [3, 0, 5], images)
