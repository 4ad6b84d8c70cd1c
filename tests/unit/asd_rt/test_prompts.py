"""Cleaning and tokenising of prompts for UMT5."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_rt.errors import BackendError, EngineError, PromptError
from asd_rt.prompts import PromptTokenizer, clean_prompt, import_extra

END = 1


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json) -> PromptTokenizer:
    return PromptTokenizer(tokenizer_json, 512)


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("", ""),
        ("  \n\t ", ""),
        ("a  cat\n walks\u3000on\u00a0grass ", "a cat walks on grass"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("&lt;b&gt; 5 &gt; 3", "<b> 5 > 3"),
        ("schÃ¶n", "schön"),  # UTF-8 that was read as Latin-1
        ("“quoted” ﬁne", '"quoted" fine'),
        ("一只猫，🎈", "一只猫,🎈"),
    ],
)
def test_cleans(prompt, cleaned) -> None:
    assert clean_prompt(prompt) == cleaned


@given(st.text())
def test_blanks_are_single_and_within(text) -> None:
    cleaned = clean_prompt(text)
    assert cleaned == " ".join(cleaned.split())


# Of accented letters ftfy guesses by what stands around them whether they were read in a wrong encoding.
ASCII = st.characters(max_codepoint=0x7F)
CHINESE = st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF)


@given(st.text(ASCII | CHINESE))
def test_blanks_around_never_matter(text) -> None:
    assert clean_prompt(f"  {text}\n") == clean_prompt(text)


@pytest.mark.parametrize("prompt", [None, 3, b"a cat", "a \ud800 cat"])
def test_what_is_no_text_is_refused(prompt) -> None:
    with pytest.raises(PromptError, match="prompt"):
        clean_prompt(prompt)


def test_empty_prompt_is_the_end_token(tokenizer) -> None:
    assert tokenizer.tokens("").tolist() == [[END]]


@pytest.mark.parametrize(
    "prompt", ["a cat", "一只猫在草地上走", "🎈🎈", "a 🐈 in Zürich", "x" * 50]
)
def test_ends_with_the_end_token(tokenizer, prompt) -> None:
    tokens = tokenizer.tokens(prompt)
    assert tokens.dtype == "int64"
    assert tokens[0, -1] == END
    assert END not in tokens[0, :-1]
    assert tokens.shape[1] > 1


def test_long_prompt_keeps_its_beginning_and_the_end_token(tokenizer, caplog) -> None:
    prompt = "a cat " * 300
    with caplog.at_level(logging.WARNING):
        tokens = tokenizer.tokens(prompt.strip())
    assert tokens.shape == (1, 512)
    assert tokens[0, -1] == END
    assert "only the first 511 count" in caplog.text
    assert tokenizer.tokens("a cat " * 30)[0, :20].tolist() == tokens[0, :20].tolist()


@given(text=st.text(max_size=40), limit=st.integers(1, 12))
def test_truncates_as_the_library_does(tokenizer_json, text, limit) -> None:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(tokenizer_json))
    library.enable_truncation(limit)
    assert (
        PromptTokenizer(tokenizer_json, limit).tokens(text)[0].tolist() == library.encode(text).ids
    )


def test_padding_and_truncation_that_a_file_asks_for_do_not_count(tokenizer_json, tmp_path) -> None:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(tokenizer_json))
    plain = library.encode("a cat walks").ids
    library.enable_truncation(2)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    assert PromptTokenizer(tmp_path / "tokenizer.json", 512).tokens("a cat walks").tolist() == [
        plain
    ]


@pytest.mark.parametrize("content", ["", "{", json.dumps({"model": 3})])
def test_damaged_tokenizer_is_named(tmp_path, content) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(EngineError, match=r"tokenizer\.json: cannot be read"):
        PromptTokenizer(path, 512)


def test_absent_package_says_what_to_install() -> None:
    with pytest.raises(BackendError, match=r"pip install 'asd-rt\[text\]'"):
        import_extra("asd_rt_no_such_package")
